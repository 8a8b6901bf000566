"""gradient_frame: B and A are the leading singular vectors of W0's gradient, the cores between tiny. arXiv:2406.04112

Each core is a random orthogonal matrix times `size`, so that ΔW starts at size³ of the frame: with 0.001, zero to
rounding, and still with a gradient in every core.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from lora_cli.adapter.delta import LowRank
from lora_cli.adapter.start import Start
from lora_cli.recipe.schema import Section

needs = {"delta.deep": "without its cores the model would not start as the base"}
forbids = {"base.packed": "of weights in few bits there is no gradient"}
measures = "gradients"


class Settings(Section):
    """Settings in a recipe: `{gradient_frame: {size: 1e-3, rows: 64}}`."""

    size: Annotated[float, Field(gt=0)] = Field(default=1e-3, description="Of every core: C·Cᵀ = size²·I.")
    rows: Annotated[int, Field(ge=1)] = Field(default=64, description="Training rows of the gradient.")


def init(delta: LowRank, start: Start, size: float, rows: int) -> None:
    """Where the layer has fewer than r directions, the rest of A and B stays zero."""
    assert start.statistic is not None
    U, _, Vt = torch.linalg.svd(start.statistic.float(), full_matrices=False)
    r = min(delta.A.shape[0], len(Vt))
    nn.init.zeros_(delta.A)
    nn.init.zeros_(delta.B)
    delta.B[:, :r], delta.A[:r] = U[:, :r], Vt[:r]
    for key, core in delta.named_parameters():
        if key not in ("A", "B"):
            nn.init.orthogonal_(core, gain=size, generator=start.generator)
