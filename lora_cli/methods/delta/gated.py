"""gated: ΔW = s·B·diag(E)·A, a trained gate E for each of the r components. arXiv:2303.10512

The form of a singular value decomposition, which lets a rank controller (`rank: adalora`, `sora` ...) close single
components; without one it is TriLoRA (arXiv:2405.11236). With `start: 1` all gates are open at first.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from lora_cli.adapter.delta import LowRank, Place, Shape
from lora_cli.recipe.schema import Section


class Settings(Section):
    """Settings in a recipe: `{gated: {start: 1}}`."""

    start: Annotated[float, Field(ge=0)] = Field(default=0.0, description="First value of every gate.")


def needs(start: float) -> dict[str, str]:
    """Something has to lead away from the start."""
    why = "with closed gates neither A nor B may start at zero: no step would lead away"
    return {} if start else {"init.small or init.closed": why}


def forbids(start: float) -> dict[str, str]:
    """With open gates A or B has to be zero."""
    never = {"init.own": "A and B would both be zero, from where no step leads"}
    why = "it fills A and B, and with open gates the model would not start as the base"
    dead = "open gates start beside a B or an A of zero, and would never have a gradient alone"
    filled = {"init.small": why, "init.closed": why, "trainable.only_core": dead}
    filled["lifecycle.restart"] = "its gates would go on as the last piece left them"
    if start not in (0, 1):
        filled |= dict.fromkeys(("init.loftq", "init.lqer"), f"its B·A would count {start:g} times")
    return never | (filled if start else {})


class Gated(LowRank):
    """E stands between B and A."""

    def __init__(self, place: Place, start: float) -> None:
        """All gates alike: closed, so that the model starts as the base, or open, where the init sees to that."""
        super().__init__(place)
        self.first = float(start)
        self.E = nn.Parameter(torch.full((place.r,), self.first))

    def start(self, generator: torch.Generator) -> None:
        """All gates alike again."""
        nn.init.constant_(self.E, self.first)

    def up(self) -> Tensor:
        """B·diag(E)."""
        return self.B * self.E


make = Gated


def shapes(in_features: int, out_features: int, r: int, start: float) -> dict[str, Shape]:
    """The tensors that make up ΔW."""
    return {"A": (r, in_features), "B": (out_features, r), "E": (r,)}
