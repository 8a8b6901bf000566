"""Cross entropy summed over the trained tokens; logits are computed at their positions only.

`loss_sum` asks the model for them. `Loss` computes them itself, a few at a time, wherever the model does nothing to its
logits but multiply them, so that they never fill the memory; the other is its oracle.
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lora_cli.data.example import IGNORE, Batch
from lora_cli.data.pack import inputs
from lora_cli.train.head import Parts, cross_entropy, parts


@dataclass(frozen=True)
class Loss:
    """−Σ log p(token) over a batch's trained tokens, as `loss_sum`, with its gradient computed on the way forward."""

    model: PreTrainedModel
    scale: float | None
    """What the model multiplies its logits with; None where it does something else, or its head trains."""
    split: Parts = parts
    """Which positions the head computes at once, where it is not the model that computes them."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Loss":
        """Try out what the model does to its logits."""
        head = model.get_output_embeddings()
        if type(head) is not nn.Linear or any(p.requires_grad for p in head.parameters()):
            return cls(model, None)
        return cls(model, _logit_scale(model, head))

    def __call__(self, batch: Batch, device: torch.device) -> Tensor:
        """Float32, on the device."""
        return self.at(batch, device, *trained(batch, device))

    def at(self, batch: Batch, device: torch.device, positions: Tensor, targets: Tensor) -> Tensor:
        """The same where it is known which positions of the flattened batch are followed by which trained tokens."""
        if self.scale is None:
            logits = logits_at(self.model, batch, device, positions)
            return F.cross_entropy(widened(logits), targets, reduction="sum")
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        hidden = states(self.model, batch, device, positions)
        return cross_entropy(hidden, head.weight, head.bias, targets, self.scale, self.split)


def states(model: PreTrainedModel, batch: Batch, device: torch.device, positions: Tensor) -> Tensor:
    """What the head reads at these positions of the flattened batch, [n, d]; it computes no logits."""
    head = model.get_output_embeddings()
    assert head is not None, "a causal language model has an output head"
    with _head_reads_nothing(head) as read:
        _forward(model, batch, device)
    return states_at(read[0], positions)


def states_at(read: Tensor, positions: Tensor) -> Tensor:
    """Of what the head was given [rows, tokens, d] that at these positions, [n, d]."""
    return read.flatten(0, -2).index_select(0, positions)


@contextmanager
def _head_reads_nothing(head: nn.Module) -> Generator[list[Tensor]]:
    """Inside the block the head computes no logits; what it was given is in the list."""
    read: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        read.append(inputs[0])
        return (inputs[0][..., :0, :],)

    handle = head.register_forward_pre_hook(keep)
    try:
        yield read
    finally:
        handle.remove()


@torch.no_grad()
def _logit_scale(model: PreTrainedModel, head: nn.Linear) -> float | None:
    """What comes out of the model when other logits come out of its head: a multiple of them, or something else."""
    logits = torch.linspace(-60, 60, head.out_features, device=head.weight.device)[None, None]
    handle = head.register_forward_hook(lambda *_: logits)
    try:
        token = torch.zeros(1, 1, dtype=torch.int64, device=logits.device)
        found = model(input_ids=token, use_cache=False).logits.float()
    finally:
        handle.remove()
    scale = (found[0, 0, -1] / 60).item()
    return scale if torch.allclose(found, scale * logits, rtol=1e-6, atol=0) else None


def loss_sum(model: PreTrainedModel, batch: Batch, device: torch.device) -> Tensor:
    """−Σ log p(token) over the batch's trained tokens; the caller divides by their number.

    Summing first and dividing once by the number of trained tokens of the whole optimizer step makes the result
    independent of how the step is split into micro-batches.
    """
    logits, targets = trained_logits(model, batch, device)
    return F.cross_entropy(widened(logits), targets, reduction="sum")


def widened(logits: Tensor) -> Tensor:
    """In float32, or in what they have where that is wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def trained_logits(model: PreTrainedModel, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits [n, vocabulary] where the next token is trained, and those tokens [n], rows of the batch in order."""
    positions, targets = trained(batch, device)
    return logits_at(model, batch, device, positions), targets


def logits_at(model: PreTrainedModel, batch: Batch, device: torch.device, positions: Tensor) -> Tensor:
    """Logits [n, vocabulary] at these positions of the flattened batch."""
    with head_sees(model, positions):
        return _forward(model, batch, device)


def trained(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the next token is trained, in the flattened batch, and those tokens.

    Found on the CPU: on a GPU, asking how many there are would wait for it.
    """
    following = batch.labels[:, 1:]
    targets = following[following != IGNORE]
    return _before_trained(batch).to(device, non_blocking=True), targets.to(device, non_blocking=True)


def _forward(model: PreTrainedModel, batch: Batch, device: torch.device) -> Tensor:
    """The logits that the model makes of what its head is given to read."""
    return model(**inputs(model, batch, device)).logits


def _before_trained(batch: Batch) -> Tensor:
    """Indices into the flattened batch of the positions whose next token is trained."""
    trained = F.pad(batch.labels[:, 1:] != IGNORE, (0, 1))
    return trained.flatten().nonzero().squeeze(1)


@contextmanager
def head_sees(model: PreTrainedModel, positions: Tensor) -> Generator[None]:
    """Inside the block the output head reads only these positions.

    The model's own forward stays in charge of what surrounds the head (soft-caps, logit scales), so the loss is
    the model's own whatever the architecture; PyTorch's forward pre-hook is how a caller may change an input.
    """

    def select(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (states_at(inputs[0], positions),)

    head = model.get_output_embeddings()
    assert head is not None, "a causal language model has an output head"
    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
