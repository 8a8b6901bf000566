"""hydra: ΔW·x = s·Σ g_n(x)·B_n·A·x, one A and several B, mixed for every token by a router g. arXiv:2404.19245

What all tasks have in common is in A, each head B_n has a part of its own. Depends on the input: never merged.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from lora_cli.adapter.delta import Place
from lora_cli.adapter.routed import FORBIDS, Experts
from lora_cli.adapter.start import uniform
from lora_cli.recipe.schema import Section

mergeable = False
needs = {"init.own": "a router has to be drawn, too"}
forbids = FORBIDS


class Settings(Section):
    """Settings in a recipe: `{hydra: {count: 3}}`."""

    count: Annotated[int, Field(ge=2)] = Field(default=3, description="Heads B_n of a layer.")


class Hydra(Experts):
    """All heads read the same A·x; every token is given some of each."""

    def __init__(self, place: Place, count: int) -> None:
        """A is [r, in]."""
        super().__init__(place, count)
        self.A = nn.Parameter(torch.zeros(place.r, place.base.in_features))

    def narrow(self, x: Tensor) -> Tensor:
        """A·x."""
        return self.project(x, self.A.to(x.dtype))[..., None, :]

    def down(self, number: int) -> Tensor:
        """A."""
        return self.A

    def start(self, generator: torch.Generator) -> None:
        """A random."""
        super().start(generator)
        uniform(self.A, generator)


make = Hydra


def shapes(in_features: int, out_features: int, r: int, count: int) -> dict[str, tuple[int, ...]]:
    """The tensors that make up ΔW."""
    return {"A": (r, in_features), "B": (out_features, count * r), "router": (count, in_features)}
