"""Adapted: W0 + ΔW, what stands in the model where the plain layer stood. `forward` is the hot path."""

from torch import Tensor, nn

from lora_cli.adapter.base import Base
from lora_cli.adapter.delta import Delta


class Adapted(nn.Module):
    """y = W0·x + Σ ΔW·x over the active deltas; with none active it computes what the plain layer computed."""

    def __init__(self, base: Base) -> None:
        """Wrap a layer; deltas come with `add`."""
        super().__init__()
        self.base = base
        self.base_layer = base.module
        self.deltas = nn.ModuleDict()
        self.active: tuple[Delta, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        """W0·x + ΔW·x."""
        y = self.base_layer(x)
        for delta in self.active:
            y = delta.add_to(y, x)
        return y

    def merged_weight(self) -> Tensor:
        """W0 + ΔW in float32, [out, in]."""
        W = self.base.weight()
        for delta in self.active:
            assert delta.mergeable, "the caller checks this"
            W = W + delta.weight()
        return W

    def merged_bias(self) -> Tensor | None:
        """The bias that goes with `merged_weight`, float32 [out]."""
        bias = None if self.base.bias is None else self.base.bias.detach().float()
        for shift in (delta.shift() for delta in self.active):
            if shift is not None:
                assert bias is not None, "the caller checks that a base without bias gets none"
                bias = bias + shift
        return bias

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        """Model code may ask a layer for its weight or bias; those are the base's."""
        if name in ("weight", "bias"):
            return getattr(self.base_layer, name)
        return super().__getattr__(name)
