"""Adapted: W0 + ΔW, what stands in the model where the plain layer stood. `forward` is the hot path."""

from typing import Any

from torch import Tensor, nn

from lora_cli.adapter.base import Base
from lora_cli.adapter.delta import Delta


class Adapted(nn.Module):
    """y = W0·x + ΔW·x. The plain layer is inside, untouched; each adapter on a model has its own."""

    peft_name: str | None = "add"
    """The combination, of those that PEFT has, that computes the same with the factors of ΔW and this one's tensors."""

    def __init__(self, base: Base, delta: Delta) -> None:
        """Put ΔW beside W0; a subclass may combine them in another way."""
        super().__init__()
        self.base = base
        self.base_layer = base.module
        self.delta = delta
        if base.channels != -1:
            self.register_forward_hook(_as_the_module)

    def forward(self, x: Tensor) -> Tensor:
        """W0·x + ΔW·x."""
        return self.delta.beside(self.base, x, self.delta.dropped(x))

    def own_tensors(self) -> dict[str, nn.Parameter]:
        """What ΔW, and how it is combined with W0, are made of, trained or frozen."""
        combined = dict(self.named_parameters(recurse=False))
        return {**dict(self.delta.named_parameters()), **combined}

    def merged_weight(self) -> Tensor:
        """The one W that computes the same, float32 [out, in]."""
        return self.base.weight() + self.delta.weight()

    def merged_bias(self) -> Tensor | None:
        """The bias that goes with `merged_weight`, float32 [out]."""
        bias = None if self.base.bias is None else self.base.bias.detach().float()
        shift = self.delta.shift()
        if shift is None:
            return bias
        assert bias is not None, "the caller checks that a base without bias gets none"
        return bias + shift

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        """Model code may ask a layer for its weight or bias; those are the base's."""
        if name in ("weight", "bias"):
            return getattr(self.base_layer, name)
        return super().__getattr__(name)


def _as_the_module(layer: Adapted, inputs: Any, y: Tensor) -> Tensor:
    """Give y [..., out] the layout of the module's own output."""
    return y.movedim(-1, layer.base.channels)
