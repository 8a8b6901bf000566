"""nola: A and B are weighted sums of K random matrices, and only the 2·K weights train. arXiv:2310.02556

The random matrices follow from `seed` and the layer's name alone, the same on every device; they are drawn anew in
every pass and never kept or saved. What is saved of a layer is its weights, however large it is. Every pass costs the
drawing of 2·K matrices of LoRA's size.
"""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_cli.adapter import counted
from lora_cli.adapter.delta import Factored, Place, Shape
from lora_cli.adapter.seed import number_of
from lora_cli.recipe.schema import Section

needs = {"init.own": "its start follows from its seed"}
forbids = {
    "base.embedding": "matrices as wide as the vocabulary would be drawn in every step",
    "lora_bias": "it has none",
    "trainable.lora_fa": "its A is made of weights: there is no A to freeze",
    "trainable.only_a": "its B is made of weights: there is no B to freeze",
    "optimizer.lora_plus": "it has no B",
    "lifecycle.restart": "its A follows from its seed, and would start as before",
}
AT_ONCE = 2**22
"""Random numbers that are in memory at a time."""


class Settings(Section):
    """Settings in a recipe: `{nola: {bases: 256}}`."""

    bases: Annotated[int, Field(ge=1)] = Field(
        default=64,
        description="K, the random matrices that A and B are sums of, each; 64 to 1024 in the paper.",
    )
    seed: Annotated[int, Field(ge=0)] = Field(
        default=0, description="What the random matrices follow from; it is saved with the adapter."
    )


class NOLA(Factored):
    """A = A0 + Σ alpha_k·A_k, B = Σ beta_k·B_k, where the entries of A_k and B_k are from U(−1, 1)/√K."""

    compact = True

    def __init__(self, place: Place, bases: int, seed: int) -> None:
        """Zero weights; A0 is drawn as LoRA's A, from U(±1/√in)."""
        super().__init__(place)
        self.alpha, self.beta = nn.Parameter(torch.zeros(bases)), nn.Parameter(torch.zeros(bases))
        self.shape_A = place.r, place.base.in_features
        self.shape_B = place.base.out_features, place.r
        self.seeds = [number_of(seed, f"{place.name}.{factor}") for factor in "AB"]

    def up(self) -> Tensor:
        """B."""
        return _sum(self.beta * len(self.beta) ** -0.5, self.seeds[1], self.shape_B)

    def down(self) -> Tensor:
        """A; A0 is one more of the random matrices, with a fixed weight."""
        first = self.alpha.new_full((1,), self.shape_A[1] ** -0.5)
        return _sum(torch.cat([self.alpha * len(self.alpha) ** -0.5, first]), self.seeds[0], self.shape_A)


class _Sum(torch.autograd.Function):
    """Σ w_k·U_k over random matrices that are drawn here, and again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, seed: int, shape: Shape) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.seed, ctx.count = seed, len(weights)
        made = weights.new_zeros(shape)
        for which, matrices in _drawn(seed, len(weights), shape, weights.device):
            made += torch.tensordot(weights[which], matrices, 1)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        found = [
            (matrices * gradient).sum((1, 2))
            for _, matrices in _drawn(ctx.seed, ctx.count, tuple(gradient.shape), gradient.device)
        ]
        return torch.cat(found), None, None


_sum: Any = _Sum.apply


def _drawn(seed: int, count: int, shape: Shape, device: torch.device) -> Any:
    """The random matrices U_k, some at a time: which, and they [some, *shape]."""
    size = shape[0] * shape[1]
    some = max(AT_ONCE // size, 1)
    for begin in range(0, count, some):
        end = min(begin + some, count)
        yield slice(begin, end), counted.uniform(seed, begin * size, end * size, device).view(-1, *shape)


make = NOLA


def shapes(in_features: int, out_features: int, r: int, bases: int, **_: Any) -> dict[str, Shape]:
    """The tensors that make up ΔW."""
    return {"alpha": (bases,), "beta": (bases,)}
