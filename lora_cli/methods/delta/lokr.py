"""lokr: ΔW = s·W1 ⊗ W2, the Kronecker product of a small matrix and another one, of rank r if that is smaller.

Both sides of the layer are split into two factors, as near to each other as they come, or the smaller one as `factor`
says: W1 [o1, i1], W2 [o2, i2] with o1·o2 = out, i1·i2 = in. A high rank with few numbers. arXiv:2309.14859
"""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from lora_cli.adapter.delta import Delta, Place, Shape
from lora_cli.adapter.start import uniform
from lora_cli.recipe.schema import Section

needs = {"init.own": "W1 starts at zero, and W2 may not"}
forbids = {
    "base.embedding": "a token would be an entry of a product, not a row",
    "base.convolution": "its input is not a row but a picture, with patches",
    "lora_bias": "there is no single B to add it to",
    "trainable.lora_fa": "it has no single A",
    "trainable.only_a": "it has no single B",
    "optimizer.lora_plus": "it has no single B",
}


class Settings(Section):
    """Settings in a recipe: `{lokr: {factor: 8}}`."""

    factor: Annotated[int, Field(ge=2)] | None = Field(
        default=None,
        description="Largest size of either side of W1; default: as near to the square root as it comes.",
    )


class LoKr(Delta):
    """(W1 ⊗ W2)·x = W1·X·W2ᵀ, where X [i1, i2] is x in rows: the product itself is never made."""

    compact = True

    def __init__(self, place: Place, factor: int | None) -> None:
        """Zero."""
        super().__init__(place.dropout)
        self.scale = place.scale
        made = shapes(place.base.in_features, place.base.out_features, place.r, factor)
        for key, shape in made.items():
            self.register_parameter(key, nn.Parameter(torch.zeros(shape)))
        self.thin = "W2" not in made

    def start(self, generator: torch.Generator) -> None:
        """W1 at zero, W2 or its factors kaiming-uniform."""
        for key, parameter in self.named_parameters():
            if key != "W1":
                uniform(parameter, generator)
        nn.init.zeros_(self.get_parameter("W1"))

    def add_dropped(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y + ΔW·x."""
        X = x.to(y.dtype).unflatten(-1, (self.get_parameter("W1").shape[1], -1))
        for W in self.second():
            X = X @ W.to(y.dtype).t()
        Y = self.get_parameter("W1").to(y.dtype) @ X
        return torch.add(y, Y.flatten(-2).to(y.dtype), alpha=self.scale)

    def second(self) -> list[Tensor]:
        """W2, or its factors in the order in which x meets them."""
        return [self.get_parameter(key) for key in (("A2", "B2") if self.thin else ("W2",))]

    def weight(self) -> Tensor:
        """s·W1 ⊗ W2."""
        W2 = self._second()
        return self.scale * torch.kron(
            self.get_parameter("W1").detach().float(), W2[0] @ W2[1] if self.thin else W2[0]
        )

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(W1 ⊗ B2, I ⊗ A2) or (I ⊗ B2, W1 ⊗ A2), whichever is thinner; None where neither is thin."""
        W1, W2 = self.get_parameter("W1").detach().float(), self._second()
        if not self.thin:
            return None
        (o1, i1), (B2, A2) = W1.shape, W2
        if min(o1, i1) * B2.shape[1] >= min(o1 * B2.shape[0], i1 * A2.shape[1]):
            return None
        left, right = (
            (W1, torch.eye(i1, device=W1.device)) if i1 <= o1 else (torch.eye(o1, device=W1.device), W1)
        )
        return self.scale * torch.kron(left, B2), torch.kron(right, A2)

    def _second(self) -> list[Tensor]:
        """W2, or (B2, A2)."""
        return [tensor.detach().float() for tensor in reversed(self.second())]


make = LoKr


def shapes(in_features: int, out_features: int, r: int, factor: int | None) -> dict[str, Shape]:
    """The tensors that make up ΔW: W2 is a product of rank r where r is less than half of its larger side."""
    i1, o1 = smaller(in_features, factor), smaller(out_features, factor)
    i2, o2 = in_features // i1, out_features // o1
    first = {"W1": (o1, i1)}
    return first | ({"A2": (r, i2), "B2": (o2, r)} if r < max(i2, o2) / 2 else {"W2": (o2, i2)})


def smaller(size: int, factor: int | None) -> int:
    """The largest divisor of `size` up to its square root, or up to `factor`."""
    return max(d for d in range(1, min(math.isqrt(size), factor or size) + 1) if size % d == 0)
