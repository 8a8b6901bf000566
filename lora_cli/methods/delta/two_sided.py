"""two_sided: ΔW = s·(B·Q + P·A) with random, frozen P [out, r] and Q [r, in]. kexue.fm/archives/9590

LoRA from both sides at once: B learns what Q lets through, A what P does. Drawn anew after every step
(`lifecycle: {restart: {every: 1}}`) it is descent along a random projection of the gradient.
"""

import torch
from torch import Tensor, nn

from lora_cli.adapter.delta import LowRank, Place

needs = {"init.random_projection": "P and Q have to be drawn"}
forbids = {"lora_bias": "there are two sides to add it to"}


class TwoSided(LowRank):
    """The factors of rank 2r, of which half train."""

    def __init__(self, place: Place) -> None:
        """A and B at zero; the init draws P and Q."""
        super().__init__(place)
        self.P = nn.Parameter(torch.zeros_like(self.B), requires_grad=False)
        self.Q = nn.Parameter(torch.zeros_like(self.A), requires_grad=False)

    def up(self) -> Tensor:
        """[B, P]."""
        return torch.cat([self.B, self.P], 1)

    def down(self) -> Tensor:
        """[Q; A]."""
        return torch.cat([self.Q, self.A], 0)


make = TwoSided


def shapes(in_features: int, out_features: int, r: int) -> dict[str, tuple[int, ...]]:
    """The tensors that make up ΔW; P and Q never train."""
    return {"A": (r, in_features), "B": (out_features, r), "P": (out_features, r), "Q": (r, in_features)}


FROZEN = frozenset({"P", "Q"})
