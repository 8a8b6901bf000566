"""additive: ΔW[a, b] = s·(B[a, b mod r] + A[a mod r, b]), a sum where LoRA has a product. kexue.fm/archives/9590

With r = 1, a vector added to the columns and one to the rows. A = B = 0 is a legal start: the gradient of a sum does
not vanish there, so nothing is random. As many numbers as LoRA of the same r, rank 2r. r has to divide both sides of
the layer.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_cli.adapter.delta import Delta, Place

needs = {"init.own": "it starts at zero"}
forbids = {
    "base.embedding": "r would have to divide the vocabulary",
    "lora_bias": "there is no B·A to add it to",
}


class Additive(Delta):
    """ΔW = s·(B·P + Qᵀ·A), where P = [I … I] repeats the identity along the inputs, and Q along the outputs."""

    def __init__(self, place: Place) -> None:
        """Zero."""
        super().__init__(place.dropout)
        self.A = nn.Parameter(torch.zeros(place.r, place.base.in_features))
        self.B = nn.Parameter(torch.zeros(place.base.out_features, place.r))
        self.scale = place.scale

    def start(self) -> None:
        """Zero."""
        nn.init.zeros_(self.A)
        nn.init.zeros_(self.B)

    def add_dropped(self, y: Tensor, x: Tensor) -> Tensor:
        """Sum x over its blocks of r for B; repeat A·x over the blocks of y."""
        r = self.A.shape[0]
        summed = x.unflatten(-1, (-1, r)).sum(-2)
        tiled = y.unflatten(-1, (-1, r)) + self.scale * F.linear(x, self.A.to(x.dtype))[..., None, :].to(
            y.dtype
        )
        return tiled.flatten(-2) + self.scale * F.linear(summed, self.B.to(x.dtype)).to(y.dtype)

    def weight(self) -> Tensor:
        """The product of the factors, written out as a sum."""
        A, B = self.A.detach().float(), self.B.detach().float()
        r = A.shape[0]
        return self.scale * (B.repeat(1, A.shape[1] // r) + A.repeat(B.shape[0] // r, 1))

    def factors(self) -> tuple[Tensor, Tensor]:
        """(s·[B, Qᵀ], [P; A]): LoRA of rank 2r."""
        A, B = self.A.detach().float(), self.B.detach().float()
        identity = torch.eye(A.shape[0], device=A.device)
        P, Q = identity.repeat(1, A.shape[1] // A.shape[0]), identity.repeat(B.shape[0] // A.shape[0], 1)
        return self.scale * torch.cat([B, Q], 1), torch.cat([P, A], 0)


make = Additive


def problem(in_features: int, out_features: int, r: int) -> str | None:
    """What keeps a layer of this shape from being adapted."""
    return f"r = {r} has to divide both sides" if in_features % r or out_features % r else None


def shapes(in_features: int, out_features: int, r: int) -> dict[str, tuple[int, ...]]:
    """The tensors that make up ΔW."""
    return {"A": (r, in_features), "B": (out_features, r)}
