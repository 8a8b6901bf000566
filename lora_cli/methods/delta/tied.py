"""tied: ΔW = s·diag(v)·B·diag(u)·A with one trained pair (A, B) for many layers, and v, u for each. arXiv:2311.09578

The layers of one kind (`share: type`), or all of them, learn one A and one B together; what they do not have in common
is in r + out numbers a layer. Freeze A with `trainable: lora_fa`.
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from lora_cli.adapter import sharing
from lora_cli.adapter.delta import Factored, Place, Shape
from lora_cli.adapter.sharing import Share
from lora_cli.adapter.start import uniform
from lora_cli.recipe.schema import Section

needs = {"init.own": "its A and B are common to several layers"}
forbids = {
    "lora_bias": "it has none",
    "trainable.only_a": "its B starts at zero and would stay there, and with it ΔW",
    "lifecycle.restart": "layers share A and B, which cannot start anew for one of them",
}


class Settings(Section):
    """Settings in a recipe: `{tied: {share: all}}`."""

    share: Share = Field(
        default="type",
        description="Who has A and B in common: layers whose names have the same ending (type), of one shape, or all.",
    )


class Tied(Factored):
    """The layer's v and u around the B and A of its group, of which it uses the first rows and columns."""

    compact = True

    def __init__(self, place: Place, share: Share) -> None:
        """B at 0, so that the model starts as the base; v and u at 1."""
        super().__init__(place)
        self.in_features, self.out_features, r = place.base.in_features, place.base.out_features, place.r
        A, B = shared_shapes(place.name, self.in_features, self.out_features, r, share)
        self.A = place.shared.tensor(A, _kaiming)
        self.B = place.shared.tensor(B, lambda shape, _: torch.zeros(shape))
        self.u = nn.Parameter(torch.ones(r))
        self.v = nn.Parameter(torch.ones(self.out_features))

    def up(self) -> Tensor:
        """diag(v)·B·diag(u)."""
        return self.v[:, None] * self.B[: self.out_features, : len(self.u)] * self.u

    def down(self) -> Tensor:
        """A."""
        return self.A[: len(self.u), : self.in_features]


make = Tied


def _kaiming(shape: Shape, generator: torch.Generator) -> Tensor:
    """As LoRA's A."""
    return uniform(torch.empty(shape), generator)


def shapes(in_features: int, out_features: int, r: int, **_: Any) -> dict[str, Shape]:
    """The tensors of a layer."""
    return {"u": (r,), "v": (out_features,)}


def shared_shapes(layer: str, in_features: int, out_features: int, r: int, share: Share) -> dict[str, Shape]:
    """What a layer needs of A and B of its group."""
    named = {"A": (r, in_features), "B": (out_features, r)}
    return {
        sharing.named(key, share, layer, in_features, out_features): shape for key, shape in named.items()
    }
