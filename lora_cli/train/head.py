"""Cross entropy of an output head, a few positions at a time: logits exist only until their gradient is known.

What goes on to the layers below, ∂L/∂hidden, is computed on the way forward, from the same logits: two products with
the head's weight where computing them again would take three, and no more logits at once than LOGITS_BYTES.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LOGITS_BYTES = {"cpu": 24 * 2**20, "cuda": 512 * 2**20}
"""Float32 logits at once. Few on a CPU, whose caches they should not flush; enough on a GPU to keep it busy."""


Parts = Callable[[int, int, str], Iterator[slice]]
"""Positions, vocabulary, type of device -> the positions that are computed at once."""


def parts(positions: int, vocabulary: int, device: str) -> Iterator[slice]:
    """As many at once as LOGITS_BYTES has room for."""
    rows = max(1, LOGITS_BYTES[device] // (4 * vocabulary))
    return (slice(first, first + rows) for first in range(0, positions, rows))


def cross_entropy(
    hidden: Tensor, W: Tensor, bias: Tensor | None, targets: Tensor, scale: float, split: Parts = parts
) -> Tensor:
    """−Σ log softmax(scale·(W·hidden + bias))[target], in float32 or wider; nothing but `hidden` gets a gradient.

    Args:
        hidden: [n, d].
        W: [vocabulary, d], frozen.
        bias: [vocabulary].
        targets: [n].
        scale: of the logits.
        split: says which positions are computed at once.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    cast = [None if tensor is None else tensor.to(dtype) for tensor in (hidden, W, bias)]
    with torch.autocast(device, enabled=False):
        return _apply(*cast, targets, scale, split)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        hidden: Tensor,
        W: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        split: Parts,
    ) -> Tensor:
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        wide = torch.promote_types(W.dtype, torch.float32)
        total = torch.zeros((), device=hidden.device, dtype=wide)
        for part in split(len(hidden), len(W), hidden.device.type):
            loss, dlogits = _softmax(F.linear(hidden[part], W, bias).to(wide).mul_(scale), targets[part])
            total += loss
            if gradient is not None:
                torch.mm(dlogits.mul_(scale).to(W.dtype), W, out=gradient[part])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dL: Tensor
    ) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * dL.to(gradient.dtype), None, None, None, None, None


def _softmax(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """−Σ log p(target), and its gradient, p minus one at the targets."""
    p = logits.softmax(-1)
    # Σ exp(logit) from the largest logit and its p: neither a second exp of everything, nor the log of a p that is 0.
    log_sum = logits.amax(-1) - p.amax(-1).log()
    at = targets[:, None]
    loss = (log_sum - logits.gather(1, at).squeeze(1)).sum()
    return loss, p.scatter_add_(1, at, p.new_full((1, 1), -1.0).expand_as(at))


_apply: Any = _CrossEntropy.apply
