"""oft: W = W0·R with R orthogonal, the product of m matrices that are block-diagonal with r×r blocks. arXiv:2306.07280

Turning the inputs leaves lengths and angles of the rows of W0 as they are. Each block is a Cayley transform, exactly
orthogonal, of r·(r − 1)/2 trained numbers that start at zero. With `factors: m` of 2 and more, BOFT
(arXiv:2311.06243): factor k has its blocks across 2ᵏ of the first one's, as in a fast Fourier transform.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from lora_cli.adapter.delta import Place
from lora_cli.adapter.orthogonal import Turned, cayley
from lora_cli.recipe.schema import Section

needs = {"init.own": "it starts at the identity", "trainable.all": "it is one tensor"}
forbids = {
    "base.embedding": "its input are ids, which cannot be turned",
    "base.convolution": "it would have to turn every patch of the input",
    "lora_bias": "there is no B·A to add it to",
}


class Settings(Section):
    """Settings in a recipe: `{oft: {factors: 2}}`."""

    factors: Annotated[int, Field(ge=1, le=30)] = Field(
        default=1, description="m: 1 turns within blocks, more also across them."
    )


class OFT(Turned):
    """The entries Q [m, in/r, r·(r − 1)/2] of skew-symmetric matrices; y = W0·(x·D₍m₎···D₍1₎) for x as a row."""

    def __init__(self, place: Place, factors: int) -> None:
        """The identity."""
        super().__init__(place)
        self.r = place.r
        self.Q = nn.Parameter(torch.zeros(shapes(place.base.in_features, 0, place.r, factors)["Q"]))

    def start(self, generator: torch.Generator) -> None:
        """The identity."""
        nn.init.zeros_(self.Q)

    def moved(self, x: Tensor) -> Tensor:
        """x·(D − I), factor by factor."""
        changes = cayley(self.Q, self.r)
        moved = across(x, changes[-1], len(changes) - 1)
        for level in reversed(range(len(changes) - 1)):
            moved = moved + across(x + moved, changes[level], level)
        return moved


def across(x: Tensor, blocks: Tensor, level: int) -> Tensor:
    """X·D with D of blocks [in/r, r, r], each across two half-blocks that are 2^level half-blocks apart."""
    shape, r = x.shape, blocks.shape[-1]
    if level == 0:
        return torch.einsum("...kb,kbc->...kc", x.unflatten(-1, (-1, r)), blocks.to(x.dtype)).reshape(shape)
    halves = x.unflatten(-1, (-1, 2, 2**level, r // 2)).transpose(-3, -2)
    turned = across(halves.reshape(shape), blocks, 0)
    return turned.view(halves.shape).transpose(-3, -2).reshape(shape)


make = OFT


def problem(in_features: int, out_features: int, r: int, factors: int) -> str | None:
    """What keeps a layer of this shape from being adapted."""
    if r < 2:
        return "r has to be 2 at least: there are no turns within blocks of 1"
    if factors > 1 and r % 2:
        return f"r = {r} has to be even: each of the {factors} factors has its blocks across two halves"
    width = r * 2 ** (factors - 1)
    return f"{width} inputs, r·2^(factors − 1), have to divide all of them" if in_features % width else None


def shapes(in_features: int, out_features: int, r: int, factors: int) -> dict[str, tuple[int, ...]]:
    """The tensors that make up ΔW."""
    return {"Q": (factors, in_features // r, r * (r - 1) // 2)}
