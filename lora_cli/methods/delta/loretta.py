"""loretta: A and B are tensor trains, chains of small cores with `bond` numbers between two of them. arXiv:2402.11417

A side of n numbers is split into factors of at most 16, one a core, so that numbers grow with the logarithm of the
layer's size. The last core of B starts at zero, and with it ΔW; the authors' code does not start at the base.
"""

import math
from collections.abc import Iterable
from functools import reduce
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from lora_cli.adapter.delta import Factored, Place, Shape
from lora_cli.recipe.schema import Section

needs = {"init.own": "the last core of B starts at zero, and no other"}
forbids = {
    "base.embedding": "a token would be an entry of a chain, not a row",
    "lora_bias": "it has none",
    "trainable.lora_fa": "its A is several tensors: there is none to freeze",
    "trainable.only_a": "its B is several tensors: there is none to freeze",
    "optimizer.lora_plus": "its B is several tensors",
}
LARGEST = 16


class Settings(Section):
    """Settings in a recipe: `{loretta: {bond: 8}}`."""

    bond: Annotated[int, Field(ge=1)] = Field(
        default=5,
        description="Rank of the tensor trains, between one core and the next; 5 to 8 in the paper.",
    )


class LoRETTA(Factored):
    """A [r, in] = the train A0·A1·…, whose first index is r; B [out, r] = B0·B1·…, whose last index is r."""

    compact = True

    def __init__(self, place: Place, bond: int) -> None:
        """Zero."""
        super().__init__(place)
        sizes = shapes(place.base.in_features, place.base.out_features, place.r, bond)
        for key, shape in sizes.items():
            self.register_parameter(key, nn.Parameter(torch.zeros(shape)))
        self.keys = {factor: [key for key in sizes if key[0] == factor] for factor in "AB"}
        self.r = place.r

    def start(self, generator: torch.Generator) -> None:
        """Normal, so that the entries of A have LoRA's spread, 1/√(3·in); the last core of B at zero."""
        for factor, wide in (("A", self.cores("A")), ("B", self.cores("B"))):
            bonds = math.prod(core.shape[0] for core in wide)
            spread = (1 / (3 * self.down().shape[1]) if factor == "A" else 1.0) / bonds
            for core in wide:
                nn.init.normal_(core, std=spread ** (0.5 / len(wide)), generator=generator)
        nn.init.zeros_(self.cores("B")[-1])

    def cores(self, factor: str) -> list[nn.Parameter]:
        """Of A or of B, each [bond before, size, bond after]."""
        return [self.get_parameter(key) for key in self.keys[factor]]

    def up(self) -> Tensor:
        """B."""
        return contracted(self.cores("B")).view(-1, self.r)

    def down(self) -> Tensor:
        """A."""
        return contracted(self.cores("A")).view(self.r, -1)


make = LoRETTA


def contracted(cores: Iterable[Tensor]) -> Tensor:
    """The tensor of which these are the train, flat."""
    return reduce(
        lambda left, core: (left @ core.flatten(1)).reshape(-1, core.shape[2]), cores, _one(cores)
    ).flatten()


def _one(cores: Iterable[Tensor]) -> Tensor:
    return next(iter(cores)).new_ones(1, 1)


def shapes(in_features: int, out_features: int, r: int, bond: int) -> dict[str, Shape]:
    """The cores, [bond before, size, bond after]."""
    sizes = {"A": [r, *split(in_features)], "B": [*split(out_features), r]}
    return {
        f"{factor}{index}": (1 if index == 0 else bond, size, 1 if index == len(chain) - 1 else bond)
        for factor, chain in sizes.items()
        for index, size in enumerate(chain)
    }


def split(size: int) -> list[int]:
    """Factors whose product is `size`, each the largest up to LARGEST that is left; a prime beyond it stays whole."""
    found: list[int] = []
    while size > 1:
        fitting = [d for d in range(2, LARGEST + 1) if size % d == 0]
        found.append(max(fitting, default=size))
        size //= found[-1]
    return found or [1]
