"""Two passes through the same rows, each with a dropout of its own: how far apart what they predict is.

½·(KL(p‖q) + KL(q‖p)) = ½·Σ (p − q)·(log p − log q), summed over the trained tokens. The first pass is the one that the
loss has just been computed from; the second one keeps nothing for a backward pass. Logits exist a few positions at a
time, as in the loss itself.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel

from lora_cli.data.example import Batch
from lora_cli.train.head import Parts
from lora_cli.train.loss import Loss, logits_at, states, states_at, trained, widened


def once_more(loss: Loss, batch: Batch, positions: Tensor) -> Tensor:
    """What one more pass has at these positions: logits where `loss` asks the model for them, else what is read."""
    of = states if loss.scale is not None else logits_at
    return of(loss.model, batch, positions.device, positions)


class Twice:
    """Watches every pass while training, so that a second one can be held against it."""

    def __init__(
        self,
        model: PreTrainedModel,
        computing: Callable[[], AbstractContextManager[Any]],
        again: Callable[[Loss, Batch, Tensor], Tensor] = once_more,
    ) -> None:
        """From now on what the head reads, and what the model makes of it, is kept until the next pass.

        Args:
            model: in training mode.
            computing: the context that it computes in.
            again: takes the second pass.
        """
        self.model, self.computing, self.again = model, computing, again
        self.read: Tensor | None = None
        self.logits: Tensor | None = None
        head = model.get_output_embeddings()
        assert head is not None, "a causal language model has an output head"
        head.register_forward_pre_hook(self._keep_read)
        model.register_forward_hook(self._keep_logits)

    def _keep_read(self, head: Any, inputs: tuple[Tensor, ...]) -> None:
        self.read = inputs[0] if self.model.training else None

    def _keep_logits(self, model: Any, inputs: Any, output: Any) -> None:
        self.logits = output.logits if self.model.training else None

    def divergence(self, loss: Loss, batch: Batch) -> Tensor:
        """Between the pass that `loss` has just been computed from and one more, in float32 or wider.

        Only the first has a gradient.
        """
        assert self.read is not None
        return self.at(loss, batch, trained(batch, self.read.device)[0])

    def at(self, loss: Loss, batch: Batch, positions: Tensor) -> Tensor:
        """The same where it is known which positions of the flattened batch are followed by trained tokens."""
        assert self.read is not None
        assert self.logits is not None
        read, logits = self.read, self.logits
        try:
            with self.computing():
                with torch.no_grad():
                    second = self.again(loss, batch, positions)
                if loss.scale is None:
                    return divergence(logits, second)
                head = self.model.get_output_embeddings()
                assert isinstance(head, nn.Linear)
                first = states_at(read, positions)
                return _apply(first, second, head.weight, head.bias, loss.scale, loss.split)
        finally:
            self.read = self.logits = None


def divergence(logits: Tensor, others: Tensor) -> Tensor:
    """½·Σ (p − q)·(log p − log q) of [n, vocabulary] and [n, vocabulary]; `others` get no gradient."""
    log_p, log_q = widened(logits).log_softmax(-1), widened(others.detach()).log_softmax(-1)
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum()


class _Divergence(torch.autograd.Function):
    """Of what a frozen head makes of [n, d] and [n, d], with its gradient computed on the way forward."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        first: Tensor,
        second: Tensor,
        W: Tensor,
        bias: Tensor | None,
        scale: float,
        split: Parts,
    ) -> Tensor:
        total = torch.zeros((), device=first.device, dtype=torch.promote_types(W.dtype, torch.float32))
        gradient = torch.empty_like(first)
        for part in split(len(first), len(W), first.device.type):
            with torch.enable_grad():
                read = first[part].detach().requires_grad_()
                both = (scale * widened(F.linear(each, W, bias)) for each in (read, second[part]))
                found = divergence(*both)
                (gradient[part],) = torch.autograd.grad(found, read)
            total += found.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dL: Tensor
    ) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * dL.to(gradient.dtype), None, None, None, None, None


_apply: Any = _Divergence.apply
