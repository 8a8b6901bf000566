"""deep: ΔW = s·B·C3·C2·C1·A, a product of three r×r matrices in a frozen frame. arXiv:2406.04112

Three small factors in a row prefer few directions: of the r that they may use, most stay closed, so that r need not be
tuned. The frame, B and A, is where the gradient of W0 points (`init: gradient_frame`).
"""

import torch
from torch import Tensor, nn

from lora_cli.adapter.delta import LowRank, Place

needs = {"init.gradient_frame": "its frame has to be measured"}
forbids = {
    "lora_bias": "there is no trained B to add it to",
    "trainable.lora_fa": "its A is frozen anyway",
    "trainable.only_a": "its B is frozen anyway",
    "optimizer.lora_plus": "its A and B are frozen",
}
CORES = ("C1", "C2", "C3")


class Deep(LowRank):
    """The cores between B and A, which never train."""

    def __init__(self, place: Place) -> None:
        """Zero; the init draws the cores."""
        super().__init__(place)
        self.A.requires_grad_(False)
        self.B.requires_grad_(False)
        for key in CORES:
            self.register_parameter(key, nn.Parameter(torch.zeros(place.r, place.r)))

    def up(self) -> Tensor:
        """B·C3·C2·C1."""
        C1, C2, C3 = (self.get_parameter(key) for key in CORES)
        return self.B @ (C3 @ C2 @ C1)


make = Deep


def shapes(in_features: int, out_features: int, r: int) -> dict[str, tuple[int, ...]]:
    """The tensors that make up ΔW; A and B never train."""
    return {"A": (r, in_features), "B": (out_features, r)} | dict.fromkeys(CORES, (r, r))


FROZEN = frozenset({"A", "B"})
