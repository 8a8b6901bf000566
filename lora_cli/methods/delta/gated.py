"""gated: ΔW = s·B·diag(E)·A, a trained gate E for each of the r components. arXiv:2303.10512

The form of a singular value decomposition, which lets a rank controller (`rank: adalora`) close single components.
Without one it is TriLoRA (arXiv:2405.11236).
"""

import torch
from torch import Tensor, nn

from lora_cli.adapter.delta import LowRank, Place

needs = {
    "init.small or init.closed": "with closed gates neither A nor B may start at zero: no step would lead away"
}


class Gated(LowRank):
    """E stands between B and A."""

    def __init__(self, place: Place) -> None:
        """All gates closed, so that the model starts as the base."""
        super().__init__(place)
        self.E = nn.Parameter(torch.zeros(place.r))

    def start(self, generator: torch.Generator) -> None:
        """All gates closed."""
        nn.init.zeros_(self.E)

    def up(self) -> Tensor:
        """B·diag(E)."""
        return self.B * self.E


make = Gated


def shapes(in_features: int, out_features: int, r: int) -> dict[str, tuple[int, ...]]:
    """The tensors that make up ΔW."""
    return {"A": (r, in_features), "B": (out_features, r), "E": (r,)}
