"""vera: ΔW = diag(b)·B·diag(d)·A with one random, frozen pair (A, B) for all layers; b and d train. arXiv:2310.11454

r + out numbers a layer at the price of a larger r (256 and more), which costs time but no memory to train. A and B
are drawn once, on the CPU, for the widest layer; the others use their first columns and rows.
"""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from lora_cli.adapter.delta import LowRank, Place, Shape
from lora_cli.recipe.schema import Section

needs = {"scale.constant": "b plays the part of a scale", "init.own": "its A and B are common to all layers"}
forbids = {"lora_bias": "VeRA has none", "rank_pattern": "all layers have one A and B"}


class Settings(Section):
    """Settings in a recipe: `{vera: {d: 0.1}}`."""

    d: Annotated[float, Field(gt=0)] = Field(default=0.1, description="First value of every entry of d.")


class Vera(LowRank):
    """The layer's b and d around the common B and A."""

    compact = True

    def __init__(self, place: Place, d: float) -> None:
        """B starts at 0, so that the model starts as the base."""
        super().__init__(place)
        self.out_features, self.in_features = self.B.shape[0], self.A.shape[1]
        self.A = place.shared.tensor("A", _drawn).requires_grad_(False)
        self.B = place.shared.tensor("B", _drawn).requires_grad_(False)
        self.b = nn.Parameter(torch.zeros(self.out_features))
        self.d = nn.Parameter(torch.full((place.r,), d))

    def up(self) -> Tensor:
        """diag(b)·B·diag(d), of this layer's rows."""
        return self.b[:, None] * self.B[: self.out_features] * self.d

    def down(self) -> Tensor:
        """A, of this layer's columns."""
        return self.A[:, : self.in_features]


make = Vera


def _drawn(shape: Shape, generator: torch.Generator) -> Tensor:
    """Kaiming-uniform with gain √2, as the paper's code."""
    bound = math.sqrt(6 / shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def shapes(in_features: int, out_features: int, r: int, d: float) -> dict[str, Shape]:
    """The tensors of a layer."""
    return {"b": (out_features,), "d": (r,)}


def shared_shapes(layer: str, in_features: int, out_features: int, r: int, d: float) -> dict[str, Shape]:
    """What a layer needs of the tensors that all have in common."""
    return {"A": (r, in_features), "B": (out_features, r)}


FROZEN = frozenset({"A", "B"})
