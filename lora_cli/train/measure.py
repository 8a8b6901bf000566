"""What methods ask to know on training rows: of a layer how its inputs or its gradients vary; the loss."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_cli.adapter.base import Base
from lora_cli.adapter.reading import reading
from lora_cli.data.cache import Examples
from lora_cli.data.example import IGNORE, Batch
from lora_cli.data.pack import micro_batches
from lora_cli.errors import ExitCode, UserError
from lora_cli.model import computing
from lora_cli.train.loss import Loss


def measure(
    kind: str,
    model: PreTrainedModel,
    bases: Mapping[str, Base],
    examples: Examples,
    rows: Sequence[int],
    *,
    precision: torch.dtype,
    pad_id: int,
) -> dict[str, Tensor]:
    """Layer -> what is asked for, float32; the model is left as it was, but for no gradient being kept.

    Args:
        kind: `inputs`: E[x·xᵀ] over all tokens, [in, in]; `gradients`: of the loss per trained token, [out, in];
            `fisher`: means of its rows, then of its columns, of what each training row's gradient is squared, summed
            over these per trained token, [out + in].
        model: plain, or with an active adapter; it computes in the mode it is in.
        bases: the layers, by name.
        examples: the training examples.
        rows: those to look at.
        precision: what the model computes in.
        pad_id: fills up rows, of which there is one at a time, so none is filled up.

    Raises:
        UserError: what was measured is not finite.
    """
    measured = _Inputs(model, bases) if kind == "inputs" else _Gradients(bases, SEEN[kind])
    device = next(model.parameters()).device
    tokens = int((examples.lengths if kind == "inputs" else examples.trained_counts)[list(rows)].sum())
    batches = micro_batches(examples, rows, max_tokens=None, max_rows=1, packing=False, pad_id=pad_id)
    with computing(model, precision):
        loss = Loss.of(model)
    with measured, computing(model, precision):
        for batch in batches:
            measured.step(lambda batch=batch: loss(batch, device))
    for name, total in measured.totals.items():
        if not torch.isfinite(total).all():
            what = f"the {kind} of this layer are not finite on the rows that its start is measured on"
            fix = "bfloat16 and float32 hold larger numbers: see train.precision"
            raise UserError(what, where=name, fix=fix, code=ExitCode.NON_FINITE)
    return {name: total / tokens for name, total in measured.totals.items()}


@torch.no_grad()
def mean_loss(model: PreTrainedModel, loss: Loss, batches: Sequence[Batch], precision: torch.dtype) -> Tensor:
    """Per trained token, float32 on the device; as the model is used, so that nothing is dropped."""
    device, training = next(model.parameters()).device, model.training
    tokens = sum(int((batch.labels[:, 1:] != IGNORE).sum()) for batch in batches)
    model.eval()
    total = torch.zeros((), device=device)
    for batch in batches:
        with reading(model, lambda batch=batch: batch.to(device).reading()), computing(model, precision):
            total += loss(batch, device)
    model.train(training)
    return total / tokens


class _Inputs:
    """Σ x·xᵀ, by hooks that see what goes into each layer, adapted or not."""

    def __init__(self, model: nn.Module, bases: Mapping[str, Base]) -> None:
        self.layers = {name: model.get_submodule(name) for name in bases}
        self.totals = {
            name: torch.zeros(base.in_features, base.in_features, device=base.device)
            for name, base in bases.items()
        }

    def __enter__(self) -> "_Inputs":
        self.handles = [
            layer.register_forward_pre_hook(self._hook(name)) for name, layer in self.layers.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def seen(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2).float()
            self.totals[name].addmm_(x.t(), x)

        return seen

    def step(self, forward: Callable[[], Tensor]) -> None:
        with torch.no_grad():
            forward()


class _Gradients:
    """Σ of what is seen of ∂L/∂W, by letting the W of each layer require a gradient for a while."""

    def __init__(self, bases: Mapping[str, Base], seen: Callable[[Tensor], Tensor]) -> None:
        self.bases, self.seen = bases, seen
        self.totals = {
            name: seen(torch.zeros(base.out_features, base.in_features, device=base.device))
            for name, base in bases.items()
        }

    def __enter__(self) -> "_Gradients":
        self.before = {name: base.module.weight.requires_grad for name, base in self.bases.items()}
        for base in self.bases.values():
            base.module.weight.requires_grad_(True)
        return self

    def __exit__(self, *_: object) -> None:
        for name, base in self.bases.items():
            base.module.weight.requires_grad_(self.before[name])

    def step(self, forward: Callable[[], Tensor]) -> None:
        weights = [base.module.weight for base in self.bases.values()]
        with torch.enable_grad():
            found = torch.autograd.grad(forward(), weights, allow_unused=True)
        for (name, base), gradient in zip(self.bases.items(), found, strict=True):
            if gradient is not None:
                self.totals[name] += self.seen(base.oriented(gradient).float())


def _squared_means(gradient: Tensor) -> Tensor:
    squared = gradient.square()
    return torch.cat([squared.mean(1), squared.mean(0)])


SEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "gradients": lambda gradient: gradient,
    "fisher": _squared_means,
}
"""What is summed of the gradient [out, in] of one training row."""
