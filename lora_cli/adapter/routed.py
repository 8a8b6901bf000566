"""Routed: several ΔW on one layer, mixed anew for every token: ΔW·x = Σ g_n(x)·ΔW_n·x with Σ g_n = 1.

No single matrix stands for it, so it is never merged. Shapes: x is [..., in], gates are [..., experts].
"""

from abc import abstractmethod
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_cli.adapter.base import Base
from lora_cli.adapter.delta import Delta, Ledger, Place
from lora_cli.adapter.start import uniform

FORBIDS = {
    "base.embedding": "a router cannot read token ids",
    "base.convolution": "a router reads tokens, not pictures",
    "lora_bias": "there is no single B to add it to",
    "trainable.only_a": "B would stay zero for ever, and with it ΔW",
}
"""What does not go with experts that each have a B; see `adapter/rules.py`."""


class Routed(Delta):
    """The router g = softmax(router·x) and what its gates weigh."""

    def __init__(self, place: Place, count: int, top: int | None = None) -> None:
        """`count` experts, of which every token gets the `top` best; None: all of them."""
        super().__init__(place.dropout)
        self.scale, self.top = place.scale, top
        self.router = nn.Parameter(torch.zeros(count, place.base.in_features))
        self.ledger = None if top is None else Ledger()

    def gates(self, x: Tensor) -> Tensor:
        """Weights of the experts for each token, float32; those that are not chosen have none."""
        logits = F.linear(x, self.router.to(x.dtype)).float()
        if self.top is None or self.ledger is None:
            return logits.softmax(-1)
        best = logits.topk(self.top, -1)
        gates = torch.zeros_like(logits).scatter(-1, best.indices, best.values.softmax(-1))
        self.ledger.write(logits, gates.detach() > 0)
        return gates

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y + ΔW·x. The router sees all of x, whatever is dropped from the input of the experts."""
        return self.mix(y, self.dropped(x), self.gates(x))

    def beside(self, base: Base, x: Tensor, dropped: Tensor) -> Tensor:
        """Return W0·x + b0 + ΔW·dropped."""
        return self.mix(base.module(x), dropped, self.gates(x))

    def add_dropped(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y + ΔW·x."""
        return self.mix(y, x, self.gates(x))

    @abstractmethod
    def mix(self, y: Tensor, x: Tensor, gates: Tensor) -> Tensor:
        """Return y + Σ gates_n·ΔW_n·x."""

    @abstractmethod
    def expert(self, number: int) -> Tensor:
        """ΔW_n in float32 [out, in], scale included."""

    def start(self, generator: torch.Generator) -> None:
        """Be zero, with a router that tells the experts apart: where it did not, all would learn the same."""
        uniform(self.router, generator)

    def weight(self) -> NoReturn:
        """There is none."""
        raise AssertionError("what depends on x is no matrix, and the rules keep it from whoever needs one")


class Experts(Routed):
    """ΔW_n = s·B_n·A_n, computed as one product: s·[B_1 … B_N]·[g_1·A_1·x; …; g_N·A_N·x]."""

    def __init__(self, place: Place, count: int, top: int | None = None) -> None:
        """B is [out, count·r], the experts side by side; a subclass has what goes in between."""
        super().__init__(place, count, top)
        self.project = place.base.project
        self.B = nn.Parameter(torch.zeros(place.base.out_features, count * place.r))

    @abstractmethod
    def narrow(self, x: Tensor) -> Tensor:
        """A_n·x of every expert, [..., experts, r], or [..., 1, r] where it is the same for all."""

    @abstractmethod
    def down(self, number: int) -> Tensor:
        """A_n [r, in]."""

    def mix(self, y: Tensor, x: Tensor, gates: Tensor) -> Tensor:
        """One addmm, as in LowRank: no temporary as wide as y, and only the small matrices are cast."""
        z = self.narrow(x)
        z = (gates.to(z.dtype)[..., None] * z).flatten(-2)
        rows, z = y.reshape(-1, y.shape[-1]), z.reshape(-1, z.shape[-1])
        return torch.addmm(rows, z.to(y.dtype), self.B.to(y.dtype).t(), alpha=self.scale).view_as(y)

    def expert(self, number: int) -> Tensor:
        """s·B_n·A_n."""
        B = self.B.detach().float().chunk(self.router.shape[0], 1)[number]
        return self.scale * B @ self.down(number).detach().float()

    def start(self, generator: torch.Generator) -> None:
        """B zero, as in LoRA."""
        super().start(generator)
        nn.init.zeros_(self.B)
