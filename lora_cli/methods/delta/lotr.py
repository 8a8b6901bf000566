"""lotr: ΔW = s·L·G·R with L and R common to many layers, and a small G for each. arXiv:2402.01376

The weights of several layers, one behind the other, as one tensor of low Tucker rank: r² numbers a layer, and one L and
one R for all layers of the same shape.
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from lora_cli.adapter import sharing
from lora_cli.adapter.delta import Factored, Place, Shape
from lora_cli.adapter.sharing import Share
from lora_cli.recipe.schema import Section

needs = {"init.own": "its L and R are common to several layers"}
forbids = {
    "lora_bias": "it has none",
    "trainable.lora_fa": "it has no A",
    "trainable.only_a": "it has no B",
    "optimizer.lora_plus": "it has no B",
    "lifecycle.restart": "layers share L and R, which cannot start anew for one of them",
}


class Settings(Section):
    """Settings in a recipe: `{lotr: {share: type}}`."""

    share: Share = Field(
        default="shape",
        description="Who has L and R in common: layers of one shape, whose names have the same ending (type), or all.",
    )


class LoTR(Factored):
    """The layer's G between the L and R of its group, of which it uses the first rows and columns."""

    compact = True

    def __init__(self, place: Place, share: Share) -> None:
        """G at 0, so that the model starts as the base."""
        super().__init__(place)
        self.in_features, self.out_features, r = place.base.in_features, place.base.out_features, place.r
        L, R = shared_shapes(place.name, self.in_features, self.out_features, r, share)
        self.L = place.shared.tensor(L, _normal)
        self.R = place.shared.tensor(R, _normal)
        self.G = nn.Parameter(torch.zeros(r, r))

    def up(self) -> Tensor:
        """L·G."""
        return self.L[: self.out_features, : len(self.G)] @ self.G

    def down(self) -> Tensor:
        """R."""
        return self.R[: len(self.G), : self.in_features]


make = LoTR


def _normal(shape: Shape, generator: torch.Generator) -> Tensor:
    """N(0, 1), as the authors' code."""
    return torch.empty(shape).normal_(generator=generator)


def shapes(in_features: int, out_features: int, r: int, **_: Any) -> dict[str, Shape]:
    """The tensors of a layer."""
    return {"G": (r, r)}


def shared_shapes(layer: str, in_features: int, out_features: int, r: int, share: Share) -> dict[str, Shape]:
    """What a layer needs of L and R of its group."""
    named = {"L": (out_features, r), "R": (r, in_features)}
    return {
        sharing.named(key, share, layer, in_features, out_features): shape for key, shape in named.items()
    }
