"""miss: ΔW[a, b] = s·B[a, b mod r], the one-sided half of `additive`, called MiSS or Bone. arXiv:2409.15371

r numbers for every output; starts at zero, with nothing random. The least to compute of all: inputs are added up in
blocks of r, and only then multiplied. r has to divide the inputs of the layer.
"""

import torch
from torch import Tensor, nn

from lora_cli.adapter.delta import Delta, Place

needs = {"init.own": "it starts at zero"}
forbids = {"base.embedding": "r would have to divide the vocabulary", "lora_bias": "it has none"}


class Miss(Delta):
    """ΔW = s·B·P, where P = [I … I] repeats the identity along the inputs."""

    def __init__(self, place: Place) -> None:
        """Zero."""
        super().__init__(place.dropout)
        self.B = nn.Parameter(torch.zeros(place.base.out_features, place.r))
        self.blocks = place.base.in_features // place.r
        self.scale = place.scale

    def start(self) -> None:
        """Zero."""
        nn.init.zeros_(self.B)

    def add_dropped(self, y: Tensor, x: Tensor) -> Tensor:
        """Sum x over its blocks, then one addmm."""
        summed = x.unflatten(-1, (self.blocks, -1)).sum(-2).flatten(0, -2)
        rows = y.reshape(-1, y.shape[-1])
        return torch.addmm(rows, summed.to(y.dtype), self.B.to(y.dtype).t(), alpha=self.scale).view_as(y)

    def weight(self) -> Tensor:
        """B side by side with itself."""
        return self.scale * self.B.detach().float().repeat(1, self.blocks)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(s·B, P)."""
        B = self.B.detach().float()
        return self.scale * B, torch.eye(B.shape[1], device=B.device).repeat(1, self.blocks)


make = Miss


def problem(in_features: int, out_features: int, r: int) -> str | None:
    """What keeps a layer of this shape from being adapted."""
    return f"r = {r} has to divide the inputs" if in_features % r else None


def shapes(in_features: int, out_features: int, r: int) -> dict[str, tuple[int, ...]]:
    """The tensors that make up ΔW."""
    return {"B": (out_features, r)}
