"""ia3: W = diag(l)·W0, one trained factor for each output, its bias included; ΔW = diag(l − 1)·W0. arXiv:2205.05638

As few numbers as a bias. The paper has it on the keys, the values and the hidden units of the feed-forward blocks:
`target_modules: [k_proj, v_proj, up_proj]`, where the last is what its gate is multiplied with, so that a factor on
the outputs of one layer is one on the inputs of the next.
"""

import torch
from torch import Tensor, nn

from lora_cli.adapter.base import Base
from lora_cli.adapter.delta import Delta, Place

needs = {"init.own": "all factors start at one", "trainable.all": "it is one tensor"}
forbids = {
    **dict.fromkeys(("r", "rank_pattern"), "it has no rank"),
    "lora_bias": "the bias is scaled with its output",
    "combine.dora": "that gives every row a length, which is what l does",
    "lifecycle.restart": "what it makes of the bias would be lost at every restart",
}


class IA3(Delta):
    """The factors l [out]; with a scale s other than 1, 1 + s·(l − 1)."""

    def __init__(self, place: Place) -> None:
        """All one."""
        super().__init__(place.dropout)
        self.base, self.scale = place.base, place.scale
        self.l = nn.Parameter(torch.ones(place.base.out_features))

    def start(self, generator: torch.Generator) -> None:
        """All one."""
        nn.init.ones_(self.l)

    def _more(self) -> Tensor:
        """What is added to a factor of one."""
        return self.scale * (self.l - 1)

    def beside(self, base: Base, x: Tensor, dropped: Tensor) -> Tensor:
        """Return (1 + s·(l − 1)) ⊙ (W0·x + b0); with dropout the part that is added sees what is left of x."""
        if dropped is not x:
            return super().beside(base, x, dropped)
        y = base(x)
        return (y * (1 + self._more())).to(
            y.dtype
        )  # the factor stays float32: in 16 bits it could be 1 or 1.008

    def add_dropped(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y + s·(l − 1) ⊙ (W0·x + b0)."""
        bias = self.base.bias
        z = self.base.times(x)
        return (y + (z if bias is None else z + bias) * self._more()).to(y.dtype)

    def weight(self) -> Tensor:
        """s·diag(l − 1)·W0."""
        return self._more().detach()[:, None] * self.base.weight()

    def shift(self) -> Tensor | None:
        """s·(l − 1) ⊙ b0."""
        bias = self.base.bias
        return None if bias is None else self._more().detach() * bias.detach().float()


make = IA3


def shapes(in_features: int, out_features: int, r: int) -> dict[str, tuple[int, ...]]:
    """The tensors that make up ΔW."""
    return {"l": (out_features,)}
