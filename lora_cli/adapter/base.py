"""Base: W0, the frozen weight of somebody else's module, and the only place that knows how it is stored."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

SAMPLED_WEIGHTS = 4096
"""Of each layer, by which a base is known again."""
SIGNS = "signs"
"""Buffer of a layer whose weights were sampled before."""


class Base(ABC):
    """A view of a frozen module as W0, always [out, in] whatever the layout underneath.

    The files of `methods/base/` are its subclasses, one a kind of module.
    """

    module: Any
    """The module itself; each view knows its type."""
    in_features: int
    out_features: int
    reads_ids = False
    """Whether x is token ids, so that W0·x is a lookup, not a product."""
    channels: int = -1
    """The dimension of the module's output that W0's rows are in; here and in ΔW they are always the last one."""
    project: Callable[[Tensor, Tensor], Tensor]
    """`project(x, A)`: A [r, in] applied to x the way W0 is applied; returns [..., r]."""
    taken: tuple[Tensor, Tensor] | None = None
    """(B, A) of what was added to W0 before it was quantised, and belongs to no weight; see `quantised`."""

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.module.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What a plain layer in its place has its weight in."""
        return self.module.weight.dtype

    @property
    @abstractmethod
    def bias(self) -> Tensor | None:
        """The module's bias [out], if it has one."""

    @property
    def dense(self) -> Tensor | None:
        """W0 [out, in] as it lies in memory, of a plain frozen matrix; None where only the module can multiply."""
        return None

    def oriented(self, stored: Tensor) -> Tensor:
        """A tensor laid out like the module's weight (its gradient, say) as [out, in], or the other way round."""
        return stored

    def __call__(self, x: Tensor) -> Tensor:
        """W0·x + b0, [..., out]."""
        return self.module(x)

    def times(self, x: Tensor) -> Tensor:
        """W0·x without the bias, [..., out]."""
        W = self.dense
        if W is None:
            W = self.weight()
        return self.project(x, W.to(x.dtype) if x.is_floating_point() else W)

    def weight(self) -> Tensor:
        """W0 in float32, [out, in]; where it is shared out among processes, all of them have to ask for it together."""
        stored = self.module.weight.detach()
        return self.oriented((stored.full_tensor() if isinstance(stored, DTensor) else stored).float())

    def through(self, A: Tensor) -> Tensor:
        """A·W0ᵀ in float32 [r, out], computed in the type that W0 is kept in."""
        W0 = self.oriented(self.module.weight)
        return F.linear(A.to(W0.dtype), W0).float()

    def signs(self) -> Tensor:
        """Of a sample of the weights; they survive every rounding."""
        noted = dict(self.module.named_buffers(recurse=False)).get(SIGNS)
        return signs(self.module.weight) if noted is None else noted

    def set_weight(self, W: Tensor) -> None:
        """Write W [out, in] where W0 is, cast to its type."""
        with torch.no_grad():
            self.module.weight.copy_(self.oriented(W))

    def as_stored(self, key: str, tensor: Tensor) -> Tensor:
        """A tensor of ΔW (`A` [r, in], `B` [out, r] ...) in the shape that PEFT has it in, beside such a module."""
        return tensor

    def without_taken(self, x: Tensor) -> Tensor:
        """W0·x + b0, less what `taken` stands for."""
        return self(x)

    @abstractmethod
    def replaced(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """A new plain module of the same kind that holds `weight` [out, in] and `bias`, in their dtype."""


def signs(weight: Tensor) -> Tensor:
    """Of a sample of its numbers."""
    flat = weight.detach().flatten()
    step = max(flat.numel() // SAMPLED_WEIGHTS, 1) | 1  # odd, to go through all columns
    return torch.signbit(flat[::step])
