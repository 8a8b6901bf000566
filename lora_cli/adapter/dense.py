"""Dense: a ΔW that is no product of thin factors. It is made for every multiplication anew, and never kept."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_cli.adapter.delta import Delta, Place


class Dense(Delta):
    """ΔW·x, where ΔW is a function of small tensors: they are what is kept for the backward pass, with x."""

    def __init__(self, place: Place) -> None:
        """A subclass has the tensors."""
        super().__init__(place.dropout)
        self.scale = place.scale

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """What ΔW is made of."""

    @staticmethod
    @abstractmethod
    def made(*tensors: Tensor) -> Tensor:
        """ΔW [out, in], without the scale, from `tensors`."""

    def add_dropped(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y + ΔW·x."""
        return y + _apply(x.to(y.dtype), self.made, self.scale, *self.tensors())

    def weight(self) -> Tensor:
        """s·ΔW."""
        return self.scale * self.made(*(tensor.detach().float() for tensor in self.tensors()))


class _Multiplied(torch.autograd.Function):
    """s·ΔW·x. Backward makes ΔW again, so that nothing of its shape waits in memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, made: Any, scale: float, *tensors: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.made, ctx.scale = made, scale
        ctx.save_for_backward(x, *tensors)
        with torch.autocast(x.device.type, enabled=False):
            return (x.reshape(-1, x.shape[-1]) @ (scale * made(*tensors)).to(x.dtype).t()).view(
                *x.shape[:-1], -1
            )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *tensors = ctx.saved_tensors
        rows, wanted = dy.reshape(-1, dy.shape[-1]), ctx.needs_input_grad[3:]
        with torch.autocast(x.device.type, enabled=False), torch.enable_grad():
            parts = [
                tensor.detach().requires_grad_(need) for tensor, need in zip(tensors, wanted, strict=True)
            ]
            W = ctx.scale * ctx.made(*parts)
            dx = (rows @ W.detach().to(dy.dtype)).view(x.shape) if ctx.needs_input_grad[0] else None
            dW = (rows.t() @ x.reshape(-1, x.shape[-1])).to(W.dtype)
            learning = [part for part in parts if part.requires_grad]
            found = iter(torch.autograd.grad(W, learning, dW) if learning else ())
        return dx, None, None, *(next(found) if need else None for need in wanted)


_apply: Any = _Multiplied.apply
