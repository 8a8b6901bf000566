"""Reading: which tokens of a batch are of one document, for deltas that decide for a whole document at once.

Layers are given tokens only, several documents in a row and some padding among them. Whoever gives the model a batch
tells it here; who does not has one document in each row, and all of it is its prompt.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Reading:
    """One batch."""

    document: Tensor
    """Number of the document that a token is of, int64 [rows, tokens]."""
    prompt: Tensor
    """Whether a decision may depend on the token, bool [rows, tokens]: no answer, which is yet to come, no padding."""
    documents: int
    """How many there are."""
    goes_on: bool = False
    """Whether the tokens that follow are further ones of these documents, one document a row."""


class Reader:
    """What a model is reading."""

    def __init__(self) -> None:
        """Nobody wants to know yet."""
        self.wanted = False
        self.now: Reading | None = None


_READERS: WeakKeyDictionary[nn.Module, Reader] = WeakKeyDictionary()


def reader_of(model: nn.Module) -> Reader:
    """Of a model, whatever adapters are on it."""
    return _READERS.setdefault(model, Reader())


@contextmanager
def reading(model: nn.Module, batch: Callable[[], Reading]) -> Generator[None]:
    """Inside the block, backward passes included, the model reads this; where nobody wants to know, it is not asked."""
    reader = _READERS.get(model)
    if reader is None or not reader.wanted:
        yield
        return
    before, reader.now = reader.now, batch()
    try:
        yield
    finally:
        reader.now = before


def rows_of(prompt: Tensor, goes_on: bool = False) -> Reading:
    """One document a row, with these tokens as its prompt [rows, tokens]."""
    number = torch.arange(len(prompt), device=prompt.device)
    return Reading(number[:, None].expand_as(prompt), prompt, len(prompt), goes_on)
