"""miss: ΔW[a, b] = s·B[a, b mod r], the one-sided half of `additive`, called MiSS or Bone. arXiv:2409.15371

r numbers for every output; starts at zero, with nothing random. r has to divide the inputs of the layer.
"""

import torch
from torch import Tensor, nn

from lora_cli.adapter.delta import Factored, Place

needs = {"init.own": "it starts at zero"}
forbids = {"base.embedding": "r would have to divide the vocabulary", "lora_bias": "it has none"}


class Miss(Factored):
    """ΔW = s·B·P, where P = [I … I] repeats the identity along the inputs."""

    def __init__(self, place: Place) -> None:
        """Zero."""
        super().__init__(place)
        self.B = nn.Parameter(torch.zeros(place.base.out_features, place.r))
        self.blocks = place.base.in_features // place.r

    def start(self, generator: torch.Generator) -> None:
        """Zero."""
        nn.init.zeros_(self.B)

    def up(self) -> Tensor:
        """B."""
        return self.B

    def down(self) -> Tensor:
        """P."""
        r = self.B.shape[1]
        return torch.eye(r, dtype=self.B.dtype, device=self.B.device).repeat(1, self.blocks)


make = Miss


def problem(in_features: int, out_features: int, r: int) -> str | None:
    """What keeps a layer of this shape from being adapted."""
    return f"r = {r} has to divide the inputs" if in_features % r else None


def shapes(in_features: int, out_features: int, r: int) -> dict[str, tuple[int, ...]]:
    """The tensors that make up ΔW."""
    return {"B": (out_features, r)}
