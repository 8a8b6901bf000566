"""Tensors that the backward pass makes a second time, because keeping them would take more than making them.

What is cheap for its size, elementwise, is not worth its memory. `again` keeps only what such a tensor is made of; a
layer that reads it and needs it for the gradient of A asks `origin`, and keeps no more. arXiv:1604.06174
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Compute = Callable[..., Tensor]


class Making:
    """How a tensor is made, for its node in the graph and for that of who reads it: the two make it once together."""

    def __init__(self, compute: Compute, device: str) -> None:
        """`compute` is called as it was on the way forward, autocast included."""
        self.compute = compute
        self.autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self.device = device
        self.made: tuple[list[Tensor], Tensor] | None = None

    def again(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Leaves with the values of `inputs`, and what they make, with its graph."""
        if self.made is None:
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            with torch.enable_grad(), self._computing():
                self.made = leaves, self.compute(*leaves)
        return self.made

    def _computing(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device, dtype=self.autocast)


def again(compute: Compute, *inputs: Tensor) -> Tensor:
    """compute(*inputs), of which nothing but the inputs is kept.

    Args:
        compute: deterministic, and cheap; without parameters that train.
        inputs: all that it depends on.
    """
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in inputs):
        return compute(*inputs)
    making = Making(compute, inputs[0].device.type)
    made: Any = _apply(making, *inputs)
    made.origin = making, inputs  # for as long as somebody has the tensor
    return made


def origin(tensor: Tensor) -> tuple[Making, tuple[Tensor, ...]] | None:
    """How a tensor was made, and of what; None where it has to be kept itself."""
    return getattr(tensor, "origin", None)


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, making: Making, *inputs: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.making = making
        ctx.save_for_backward(*inputs)
        return making.compute(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        leaves, made = ctx.making.again(ctx.saved_tensors)
        ctx.making.made = None
        torch.autograd.backward(made, dY)  # of which, unlike `grad`, hooks that count modules know
        return None, *(leaf.grad for leaf in leaves)


_apply: Any = _Again.apply
