"""eva: the rows of A are the directions in which the layer's inputs vary most, B = 0. arXiv:2410.07170

Measured on training rows before the first step. With `redistribute`, layers whose inputs need more directions get a
larger r, the sum staying what it was.
"""

from collections import Counter
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from lora_cli.adapter.delta import LowRank
from lora_cli.adapter.start import Start
from lora_cli.recipe.schema import Section

forbids = {
    "base.embedding": "its inputs are token ids, of which there is no covariance",
    "base.convolution": "the covariance of its patches is not measured",
}
measures = "inputs"


class Settings(Section):
    """Settings in a recipe: `{eva: {rows: 256, rho: 2.0}}`."""

    rows: Annotated[int, Field(ge=1)] = Field(default=256, description="Training rows that are looked at.")
    rho: Annotated[float, Field(ge=1)] = Field(
        default=1.0, description="A layer's r may grow to this multiple of the recipe's; 1 keeps r as it is."
    )


def init(delta: LowRank, start: Start, rows: int, rho: float) -> None:
    """A = the leading eigenvectors of E[x·xᵀ], which are the right singular vectors of the inputs."""
    assert start.statistic is not None
    directions = torch.linalg.eigh(start.statistic.double()).eigenvectors.flip(1).t().float()
    r = min(delta.A.shape[0], len(directions))
    delta.A[:r] = directions[:r]
    nn.init.zeros_(delta.B)


def ranks(wanted: dict[str, int], statistics: dict[str, Tensor], rho: float, rows: int) -> dict[str, int]:
    """Share out Σ r: one to every layer, then the directions that explain most of their layer's inputs first.

    At most rho·r a layer.
    """
    explained: list[tuple[bool, float, str]] = []
    for name, r in wanted.items():
        values = torch.linalg.eigvalsh(statistics[name].double()).flip(0).clamp(min=0)
        shares = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
        found = shares[: int(rho * r)].tolist()
        explained += [(number > 0, -share, name) for number, share in enumerate(found)]
    explained.sort(key=lambda found: found[:2])
    chosen = Counter(name for *_, name in explained[: sum(wanted.values())])
    return {name: chosen[name] for name in wanted}
