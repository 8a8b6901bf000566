"""The two things that flow through the data pipeline."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_cli.adapter.reading import Reading

IGNORE = -100
"""Label of a position that is not trained on, as in PyTorch's cross entropy."""


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised document."""

    input_ids: tuple[int, ...]
    trained: tuple[bool, ...]
    """Whether the token at this position is learned; the first token never is, nothing predicts it."""
    where: str
    """`file:line` of the row it came from."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass reads. All tensors are int64 of shape (rows, length)."""

    input_ids: Tensor
    labels: Tensor
    """The token that stands at this position, or IGNORE; the loss compares it with the prediction one to the left."""
    position_ids: Tensor
    """Restart at 0 with each document."""
    attention_mask: Tensor | None
    """1 for tokens and 0 for padding; None for packed rows, whose documents are told apart by position_ids."""
    rows: tuple[int, ...]
    """Indices of the examples, to name them when something goes wrong."""

    def reading(self) -> Reading:
        """Its documents; the prompt of one is what stands before its first learned token."""
        number = (self.position_ids == 0).flatten().cumsum(0) - 1
        learned = (self.labels != IGNORE).flatten()
        before = learned.cumsum(0) - learned.long()  # learned tokens before each one, in the whole batch
        first = torch.searchsorted(number, number)  # where its document begins
        prompt = (before + learned.long() - before[first] == 0).view_as(self.labels)
        if self.attention_mask is not None:
            prompt = prompt & (self.attention_mask != 0)
        return Reading(number.view_as(self.labels), prompt, max(len(self.rows), 1))

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device, copied without waiting."""
        move = {"device": device, "non_blocking": True}
        mask = None if self.attention_mask is None else self.attention_mask.to(**move)
        return Batch(
            self.input_ids.to(**move), self.labels.to(**move), self.position_ids.to(**move), mask, self.rows
        )
