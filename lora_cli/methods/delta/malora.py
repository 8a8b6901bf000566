"""malora: ΔW·x = s·Σ g_n(x)·B_n·P_n·S·x, experts that share their down-projection S. arXiv:2410.22782

S [width·r, in] finds what the experts have in common, P_n [r, width·r] picks from it, B_n is the expert's own: fewer
numbers than experts with an A each. A token is given its `top` best experts. Depends on the input: never merged.
"""

from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from lora_cli.adapter.delta import Place
from lora_cli.adapter.routed import FORBIDS, Experts
from lora_cli.adapter.start import uniform
from lora_cli.recipe.schema import Section

mergeable = False
needs = {"init.own": "a router has to be drawn, too"}
forbids = FORBIDS | {
    "base.expert": "an expert is given some of the tokens only, and not where they stand",
    "trainable.lora_fa": "it has no A",
    "trainable.only_a": "it has no A",
    "optimizer.lora_plus": "it has no A",
}


class Settings(Section):
    """Settings in a recipe: `{malora: {count: 8, top: 2, width: 2}}`."""

    count: Annotated[int, Field(ge=3)] = Field(default=8, description="Experts of a layer.")
    top: Annotated[int, Field(ge=2)] = Field(
        default=2,
        description="Experts that a token is given, the best ones; of one the router would learn nothing.",
    )
    width: Annotated[int, Field(ge=1)] = Field(default=2, description="Rows of S, as a multiple of r.")

    def contradictions(self) -> Iterator[str]:
        """Some of them, not all."""
        if self.top >= self.count:
            yield "'top' has to be below 'count'; with all experts there is nothing to choose"


class Malora(Experts):
    """P is [count·r, width·r], the experts one below the other."""

    def __init__(self, place: Place, count: int, top: int, width: int) -> None:
        """S is [width·r, in]."""
        super().__init__(place, count, top)
        self.S = nn.Parameter(torch.zeros(width * place.r, place.base.in_features))
        self.P = nn.Parameter(torch.zeros(count * place.r, width * place.r))

    def narrow(self, x: Tensor) -> Tensor:
        """P_n·S·x."""
        z = self.project(x, self.S.to(x.dtype))
        return F.linear(z, self.P.to(z.dtype)).unflatten(-1, (self.router.shape[0], -1))

    def down(self, number: int) -> Tensor:
        """P_n·S."""
        return self.P.chunk(self.router.shape[0])[number] @ self.S

    def start(self, generator: torch.Generator) -> None:
        """S as A in LoRA; P so that P·S is about as large."""
        super().start(generator)
        uniform(self.S, generator)
        nn.init.normal_(self.P, std=self.P.shape[1] ** -0.5, generator=generator)


make = Malora


def shapes(
    in_features: int, out_features: int, r: int, count: int, top: int, width: int
) -> dict[str, tuple[int, ...]]:
    """The tensors that make up ΔW."""
    return {
        "S": (width * r, in_features),
        "P": (count * r, width * r),
        "B": (out_features, count * r),
        "router": (count, in_features),
    }
