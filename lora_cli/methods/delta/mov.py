"""mov: ΔW·x = s·(V·g(x)) ⊙ (W0·x), r vectors that stretch the outputs, mixed by a router g. arXiv:2309.05444

(IA)³ with several vectors, here as their distance from 1: r·out numbers and a router, which mixes anew for every
token. The bias is not stretched. Depends on the input: never merged.
"""

import torch
from torch import Tensor, nn

from lora_cli.adapter.base import Base
from lora_cli.adapter.delta import Place
from lora_cli.adapter.routed import Routed

mergeable = False
needs = {
    "init.own": "a router has to be drawn, too",
    "scale.constant": "nothing grows with the number of vectors: their weights add up to 1",
}
forbids = {
    "base.embedding": "a router cannot read token ids",
    "base.convolution": "a router reads tokens, not pictures",
    "lora_bias": "it has no B",
    "dropout": "it has no input of its own, it stretches W0·x",
    **{f"trainable.{name}": "it has neither A nor B that could be frozen" for name in ("lora_fa", "only_a")},
    "optimizer.lora_plus": "it has neither A nor B",
}


class Mov(Routed):
    """W0·x, stretched."""

    def __init__(self, place: Place) -> None:
        """V is [out, r]."""
        super().__init__(place, place.r)
        self.base = place.base
        self.V = nn.Parameter(torch.zeros(place.base.out_features, place.r))

    def beside(self, base: Base, x: Tensor, dropped: Tensor) -> Tensor:
        """W0·x is computed once."""
        y = base.module(x)
        return self._stretched(y, y if base.bias is None else y - base.bias, self.gates(x))

    def mix(self, y: Tensor, x: Tensor, gates: Tensor) -> Tensor:
        """To any y."""
        stretched = self.base.module(x)
        bias = self.base.bias
        return self._stretched(y, stretched if bias is None else stretched - bias, gates)

    def _stretched(self, y: Tensor, Wx: Tensor, gates: Tensor) -> Tensor:
        by = gates.to(Wx.dtype) @ self.V.to(Wx.dtype).t()
        return torch.addcmul(y, by, Wx.to(y.dtype), value=self.scale)

    def expert(self, number: int) -> Tensor:
        """s·diag(V_n)·W0."""
        return self.scale * self.V.detach().float()[:, number, None] * self.base.weight()

    def start(self, generator: torch.Generator) -> None:
        """Nothing is stretched."""
        super().start(generator)
        nn.init.zeros_(self.V)


make = Mov


def problem(in_features: int, out_features: int, r: int) -> str | None:
    """What keeps a layer from being adapted."""
    return "of one vector nothing can be chosen: r has to be 2 at least" if r < 2 else None


def shapes(in_features: int, out_features: int, r: int) -> dict[str, tuple[int, ...]]:
    """The tensors that make up ΔW."""
    return {"V": (out_features, r), "router": (r, in_features)}
