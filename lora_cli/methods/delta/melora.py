"""melora: ΔW is made of n blocks on the diagonal, each a small LoRA of rank r. arXiv:2402.17263

Block k maps its share of the inputs to its share of the outputs. LoRA's numbers at the same r, and n times its rank: at
LoRA's rank, n times fewer numbers. n has to divide both sides of the layer.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from lora_cli.adapter.delta import Factored, Place, Shape
from lora_cli.recipe.schema import Section

needs = {"init.own": "each of its blocks starts as a LoRA of its own"}
forbids = {
    "base.embedding": "n would have to divide the vocabulary",
    "lora_bias": "it has none",
    "trainable.only_a": "its B starts at zero and would stay there, and with it ΔW",
}


class Settings(Section):
    """Settings in a recipe: `{melora: {n: 4}}`."""

    n: Annotated[int, Field(ge=1)] = Field(default=4, description="Number of blocks; 2 to 8 in the paper.")


class MELoRA(Factored):
    """ΔW = s·diag(B_1·A_1, ..., B_n·A_n). A has the A_k side by side, B the B_k below each other."""

    def __init__(self, place: Place, n: int) -> None:
        """Zero."""
        super().__init__(place)
        self.n = n
        self.A = nn.Parameter(torch.zeros(place.r, place.base.in_features))
        self.B = nn.Parameter(torch.zeros(place.base.out_features, place.r))

    def start(self, generator: torch.Generator) -> None:
        """A_k ~ U(±1/√(in/n)), as a LoRA on in/n inputs; B at zero."""
        bound = (self.A.shape[1] / self.n) ** -0.5
        nn.init.uniform_(self.A, -bound, bound, generator=generator)
        nn.init.zeros_(self.B)

    def up(self) -> Tensor:
        """diag(B_1, ..., B_n), [out, n·r]."""
        return torch.block_diag(*self.B.chunk(self.n, 0))

    def down(self) -> Tensor:
        """diag(A_1, ..., A_n), [n·r, in]."""
        return torch.block_diag(*self.A.chunk(self.n, 1))


make = MELoRA


def problem(in_features: int, out_features: int, r: int, n: int) -> str | None:
    """What keeps a layer of this shape from being adapted."""
    return f"n = {n} has to divide both sides" if in_features % n or out_features % n else None


def shapes(in_features: int, out_features: int, r: int, n: int) -> dict[str, Shape]:
    """The tensors that make up ΔW."""
    return {"A": (r, in_features), "B": (out_features, r)}
