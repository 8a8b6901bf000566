"""core: ΔW = s·B·C·A, a full r×r matrix C between the factors. arXiv:2405.14739

C mixes every direction of A with every one of B, where LoRA pairs the first with the first. With A and B frozen
(`trainable: only_core`) the r² numbers of C are all that trains.
"""

import torch
from torch import Tensor, nn

from lora_cli.adapter.delta import LowRank, Place

needs = {"init.closed or init.svd_of_w": "C starts at zero, so neither A nor B may"}


class Core(LowRank):
    """C stands between B and A."""

    def __init__(self, place: Place) -> None:
        """Zero, so that the model starts as the base."""
        super().__init__(place)
        self.C = nn.Parameter(torch.zeros(place.r, place.r))

    def start(self, generator: torch.Generator) -> None:
        """C at zero."""
        nn.init.zeros_(self.C)

    def up(self) -> Tensor:
        """B·C."""
        return self.B @ self.C


make = Core


def shapes(in_features: int, out_features: int, r: int) -> dict[str, tuple[int, ...]]:
    """The tensors that make up ΔW."""
    return {"A": (r, in_features), "B": (out_features, r), "C": (r, r)}
