"""The micro-batches of a run, by their lengths alone."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lora_cli.analyze.rehearse import Rows
from lora_cli.data.example import Example
from lora_cli.data.pack import groups
from lora_cli.recipe.schema import TrainRecipe

LOOKED_AT, EXAMPLES = 100, 50_000
"""Steps of a run whose micro-batches are made, spread over its first epoch; fewer where a step has many examples."""


@dataclass(frozen=True)
class Documents:
    """Examples of which nothing is known but how long they are, and how much of them is learned."""

    lengths: np.ndarray
    trained: np.ndarray

    def __len__(self) -> int:
        """How many."""
        return len(self.lengths)

    def __getitem__(self, index: int, /) -> Example:
        """One, whose tokens are no tokens."""
        ids = range(int(self.lengths[index]))
        return Example(ids, (), "")  # pyright: ignore[reportArgumentType]


def steps_of(
    documents: Documents,
    order: np.ndarray,
    train: TrainRecipe,
    *,
    packing: bool,
    budget: int,
    processes: int = 1,
) -> list[list[Rows]]:
    """The micro-batches of one process in some of the steps of an epoch, the one with the longest document among them.

    Args:
        documents: all of them.
        order: of the epoch.
        train: says how many are in a step, and how many at once.
        packing: joined or padded.
        budget: tokens at once under `micro_batch_size: auto`.
        processes: that share a step.
    """
    size = train.batch_size
    starts = range(0, len(order), size)
    longest = int(np.argmax(documents.lengths[order])) // size * size
    count = max(min(LOOKED_AT, EXAMPLES // size), 1)
    chosen = sorted({*starts[:: -(-len(starts) // count)], longest})
    return [
        [*_micro_batches(documents, order[start : start + size], train, packing, budget, processes)]
        for start in chosen
    ]


def _micro_batches(
    documents: Documents, rows: np.ndarray, train: TrainRecipe, packing: bool, budget: int, processes: int
) -> Iterator[Rows]:
    by_length = sorted(rows, key=lambda row: -documents.lengths[row])
    auto = train.micro_batch_size == "auto"
    found = groups(
        documents,
        by_length[::processes],
        max_tokens=budget if auto else None,
        max_rows=None if auto else int(train.micro_batch_size),
        packing=packing,
    )
    for group in found:
        indices = [index for index, _ in group]
        lengths = tuple(int(documents.lengths[index]) for index in indices)
        yield Rows(lengths, int(documents.trained[indices].sum()), packing)
