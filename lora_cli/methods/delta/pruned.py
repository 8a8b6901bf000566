"""pruned: W = diag(k)·(W0 + s·B·A), where k is 1 for the rows that stay and 0 for those that are gone. arXiv:2305.18403

`lifecycle: loraprune` writes k; until it has decided, this is LoRA. The base is not touched: the file holds A, B and k.
The bias of a row goes with it.
"""

import torch
from torch import Tensor, nn

from lora_cli.adapter.base import Base
from lora_cli.adapter.delta import LowRank, Place, Shape
from lora_cli.adapter.start import uniform

needs = {"init.own": "what A and B start as may be no part of W0: it would be pruned away"}
forbids = {
    "combine.dora": "a row that is gone has no length",
    "trainable.only_a": "B would stay zero for ever",
    "lifecycle.restart": "W0 would take in what is gone, and its bias would not",
}


class Pruned(LowRank):
    """k multiplies what comes out."""

    compact = True

    def __init__(self, place: Place) -> None:
        """Every row stays."""
        super().__init__(place)
        self.base = place.base
        self.k = nn.Parameter(torch.ones(place.base.out_features), requires_grad=False)

    def start(self, generator: torch.Generator) -> None:
        """As in LoRA, with every row there."""
        uniform(self.A, generator)
        nn.init.zeros_(self.B)
        nn.init.ones_(self.k)

    def beside(self, base: Base, x: Tensor, dropped: Tensor) -> Tensor:
        """Return k ⊙ (W0·x + b0 + s·B·A·dropped)."""
        y = super().beside(base, x, dropped)
        return y * self.k.to(y.dtype)

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y + ΔW·x."""
        return self.add_dropped(y, self.dropped(x))

    def add_dropped(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y + k ⊙ s·B·A·x + (k − 1) ⊙ (W0·x + b0)."""
        own, bias = self.base.times(x), self.base.bias
        if bias is not None:
            own = own + bias
        learned = super().add_dropped(torch.zeros_like(own), x)
        return (y + self.k * learned + (self.k - 1) * own).to(y.dtype)

    def weight(self) -> Tensor:
        """diag(k)·(W0 + s·B·A) − W0."""
        W0 = self.base.weight()
        B, A = super().factors()
        return self.k.detach()[:, None] * (W0 + B @ A) - W0

    def factors(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Rows of W0 are no thin product."""

    def shift(self) -> Tensor | None:
        """What is gone of the bias, and what stays of the one that B adds."""
        bias, own = self.base.bias, super().shift()
        if bias is None:
            return None
        bias = bias.detach().float()
        return self.k.detach() * (bias if own is None else bias + own) - bias


make = Pruned


def shapes(in_features: int, out_features: int, r: int) -> dict[str, Shape]:
    """The tensors that make up ΔW; k never trains."""
    return {"A": (r, in_features), "B": (out_features, r), "k": (out_features,)}


FROZEN = frozenset({"k"})
