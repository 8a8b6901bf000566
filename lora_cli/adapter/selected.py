"""Selected: LoRA whose components have learned shares, until it is decided which of them there are. arXiv:2403.09113"""

import torch
from torch import Tensor, nn

from lora_cli.adapter.delta import LowRank, Place


class Selected(LowRank):
    """Softmax(E) stands between B and A while the shares are learned."""

    def __init__(self, place: Place) -> None:
        """Equal shares."""
        super().__init__(place)
        self.E = nn.Parameter(torch.zeros(place.r))
        self.decided = False

    def up(self) -> Tensor:
        """B·diag(softmax(E)), or B."""
        return self.B if self.decided else self.B * self.E.softmax(0)
