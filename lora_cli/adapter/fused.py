"""W0·x + s·B·(A·x) as one step of the graph, for a W0 that is a plain frozen matrix. `Factored._add` is its oracle.

What autograd makes of the same two lines copies y, computes two input gradients and adds them, and keeps more. Here
the thin products are added in place, in both directions, and nothing of W0's shape is made.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora_cli.adapter.again import Making, origin


def product(
    x: Tensor, dropped: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
) -> Tensor:
    """W·x + bias + scale·B·(A·dropped), [..., out], in what the model computes in.

    Args:
        x: [..., in].
        dropped: x after dropout, or x itself.
        W: [out, in], frozen.
        bias: [out].
        A: [r, in], of any float type.
        B: [out, r], of any float type.
        scale: s.
    """
    device = x.device.type
    other = None if dropped is x else dropped
    if not torch.is_autocast_enabled(device):
        y = _apply(x, other, W, bias, A.to(x.dtype), B.to(x.dtype), scale, origin(dropped))
        return y.view(*x.shape[:-1], len(W))  # here, so that model code may write into it
    dtype = torch.get_autocast_dtype(device)
    cast = [None if tensor is None else tensor.to(dtype) for tensor in (x, other, W, bias, A, B)]
    with torch.autocast(device, enabled=False):
        y = _apply(*cast, scale, origin(dropped))
    return y.view(*x.shape[:-1], len(W))  # not -1: there may be no rows


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        W: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        origin: tuple[Making, tuple[Tensor, ...]] | None,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        read = rows if dropped is None else dropped.reshape(rows.shape)
        z = read @ A.t()
        y = F.linear(rows, W, bias).addmm_(z, B.t(), alpha=scale)
        ctx.scale, ctx.shape = scale, x.shape
        ctx.making, kept = None, (read,)
        if not ctx.needs_input_grad[4]:  # a frozen A (LoRA-FA) needs no x: the largest thing that is kept
            kept = ()
        elif origin is not None:
            ctx.making, kept = origin[0], [tensor.detach() for tensor in origin[1]]
        ctx.save_for_backward(W, A, B, z, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        W, A, B, z, *kept = ctx.saved_tensors
        of_x, of_dropped, _, of_bias, of_A, of_B, *_ = ctx.needs_input_grad
        dY = dY.reshape(-1, dY.shape[-1])
        dz = (dY @ B).mul_(ctx.scale)
        dx = dY @ W if of_x else None
        ddropped = dz @ A if of_dropped else None
        if dx is not None and not of_dropped:
            dx.addmm_(dz, A)
        return (
            None if dx is None else dx.view(ctx.shape),
            None if ddropped is None else ddropped.view(ctx.shape),
            None,
            dY.sum(0) if of_bias else None,
            dz.t() @ _read(ctx.making, kept, dz) if of_A else None,
            (dY.t() @ z).mul_(ctx.scale) if of_B else None,
            None,
            None,
        )


def narrow(x: Tensor, A: Tensor) -> Tensor:
    """A·x [..., r], of an x [..., in] of which less may be kept than it is, beside a W0 of any kind."""
    made, device = origin(x), x.device.type
    if made is None:
        return F.linear(x, A)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    narrowed: Any = _Narrow.apply
    with torch.autocast(device, enabled=False):
        return narrowed(x.to(dtype), A.to(dtype), made)


class _Narrow(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, A: Tensor, origin: tuple[Making, tuple[Tensor, ...]]
    ) -> Tensor:
        ctx.making, kept = origin[0], [tensor.detach() for tensor in origin[1]]
        ctx.save_for_backward(A, *(kept if ctx.needs_input_grad[1] else ()))
        return F.linear(x, A)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        A, *kept = ctx.saved_tensors
        of_x, of_A, _ = ctx.needs_input_grad
        rows = dz.reshape(-1, dz.shape[-1])
        return dz @ A if of_x else None, rows.t() @ _read(ctx.making, kept, rows) if of_A else None, None


def _read(making: Making | None, kept: list[Tensor], like: Tensor) -> Tensor:
    """What was read [rows, in]: kept, or made once more from what was."""
    if making is None:
        return kept[0]
    _, made = making.again(kept)
    return made.detach().reshape(len(like), -1).to(like.dtype)


_apply: Any = _Product.apply
