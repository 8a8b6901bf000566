"""experts: ΔW·x = s·Σ g_n(x)·B_n·A_n·x, several LoRAs on one layer, mixed by a router g. arXiv:2309.05444

The router mixes anew for every token, with weights that add up to 1. Depends on the input: never merged.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from lora_cli.adapter import routed
from lora_cli.adapter.delta import Place
from lora_cli.adapter.start import uniform
from lora_cli.recipe.schema import Section

mergeable = False
needs = {"init.own": "a router has to be drawn, too"}
forbids = routed.FORBIDS


class Settings(Section):
    """Settings in a recipe: `{experts: {count: 8}}`."""

    count: Annotated[int, Field(ge=2)] = Field(default=8, description="Experts of a layer.")


class Experts(routed.Experts):
    """Every expert has a pair of its own."""

    def __init__(self, place: Place, count: int) -> None:
        """A is [count·r, in], the experts one below the other."""
        super().__init__(place, count)
        self.A = nn.Parameter(torch.zeros(count * place.r, place.base.in_features))

    def narrow(self, x: Tensor) -> Tensor:
        """A_n·x."""
        return self.project(x, self.A.to(x.dtype)).unflatten(-1, (self.router.shape[0], -1))

    def down(self, number: int) -> Tensor:
        """A_n."""
        return self.A.chunk(self.router.shape[0])[number]

    def start(self, generator: torch.Generator) -> None:
        """A random."""
        super().start(generator)
        uniform(self.A, generator)


make = Experts


def shapes(in_features: int, out_features: int, r: int, count: int) -> dict[str, tuple[int, ...]]:
    """The tensors that make up ΔW."""
    return {"A": (count * r, in_features), "B": (out_features, count * r), "router": (count, in_features)}
