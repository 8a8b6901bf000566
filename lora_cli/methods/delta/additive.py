"""additive: ΔW[a, b] = s·(B[a, b mod r] + A[a mod r, b]), a sum where LoRA has a product. kexue.fm/archives/9590

With r = 1, a vector added to the columns and one to the rows. A = B = 0 is a legal start: the gradient of a sum does
not vanish there, so nothing is random. As many numbers as LoRA of the same r, rank 2r. r has to divide both sides of
the layer.
"""

import torch
from torch import Tensor, nn

from lora_cli.adapter.delta import Factored, Place

needs = {"init.own": "it starts at zero"}
forbids = {
    "base.embedding": "r would have to divide the vocabulary",
    "lora_bias": "there is no B·A to add it to",
}


class Additive(Factored):
    """ΔW = s·(B·P + Qᵀ·A), where P = [I … I] repeats the identity along the inputs, and Q along the outputs."""

    def __init__(self, place: Place) -> None:
        """Zero."""
        super().__init__(place)
        self.A = nn.Parameter(torch.zeros(place.r, place.base.in_features))
        self.B = nn.Parameter(torch.zeros(place.base.out_features, place.r))

    def start(self, generator: torch.Generator) -> None:
        """Zero."""
        nn.init.zeros_(self.A)
        nn.init.zeros_(self.B)

    def up(self) -> Tensor:
        """[B, Qᵀ]."""
        return torch.cat([self.B, identities(self.B.t()).t()], 1)

    def down(self) -> Tensor:
        """[P; A]."""
        return torch.cat([identities(self.A), self.A], 0)


def identities(like: Tensor) -> Tensor:
    """[I … I], as wide as `like` [r, n]."""
    r, n = like.shape
    return torch.eye(r, dtype=like.dtype, device=like.device).repeat(1, n // r)


make = Additive


def problem(in_features: int, out_features: int, r: int) -> str | None:
    """What keeps a layer of this shape from being adapted."""
    return f"r = {r} has to divide both sides" if in_features % r or out_features % r else None


def shapes(in_features: int, out_features: int, r: int) -> dict[str, tuple[int, ...]]:
    """The tensors that make up ΔW."""
    return {"A": (r, in_features), "B": (out_features, r)}
