"""scaled: ΔW = s·diag(b)·B·diag(d)·A, as VeRA, but with an A and a B of its own in every layer. arXiv:2403.13269

All four may train; `lifecycle: aflora` freezes A and B on the way, and b and d learn on.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from lora_cli.adapter.delta import LowRank, Place, Shape
from lora_cli.recipe.schema import Section

needs = {"init.own": "b starts at zero; A and B may not"}
forbids = {
    "lifecycle.restart": "with b at zero again after every restart, A, B and d would wait for it again"
}


class Settings(Section):
    """Settings in a recipe: `{scaled: {d: 0.1}}`."""

    d: Annotated[float, Field(gt=0)] = Field(default=0.1, description="First value of every entry of d.")


class Scaled(LowRank):
    """A vector on either side of B."""

    def __init__(self, place: Place, d: float) -> None:
        """B's side starts at 0, so that the model starts as the base."""
        super().__init__(place)
        self.b = nn.Parameter(torch.zeros(self.B.shape[0]))
        self.d = nn.Parameter(torch.full((place.r,), d))

    def start(self, generator: torch.Generator) -> None:
        """Draw A and B, Kaiming-uniform with gain √2 as the authors' code; b at 0 is what closes ΔW."""
        for factor in (self.A, self.B):
            nn.init.kaiming_uniform_(factor, generator=generator)

    def up(self) -> Tensor:
        """diag(b)·B·diag(d)."""
        return self.b[:, None] * self.B * self.d


make = Scaled


def shapes(in_features: int, out_features: int, r: int, d: float) -> dict[str, Shape]:
    """The tensors that make up ΔW."""
    return {"A": (r, in_features), "B": (out_features, r), "b": (out_features,), "d": (r,)}
