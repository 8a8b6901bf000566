"""Examples -> Batches by token budget. Documents never see each other.

Which examples a step learns is a pure function of (seed, epoch): there is nothing to save for a resume.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from inspect import signature
from typing import Any, Protocol, TypeGuard

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lora_cli import varlen
from lora_cli.adapter.reading import reading
from lora_cli.data.cache import Examples
from lora_cli.data.example import IGNORE, Batch, Example
from lora_cli.errors import ExitCode, UserError


class Documents(Protocol):
    """Examples by index: on disk, or a list of them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


# Order


def epoch_length(examples: Documents, among: np.ndarray | None = None) -> int:
    """How many examples an epoch has, told from their counts alone; `among`: of these only, by index."""
    if not _weighted(examples):
        return len(examples) if among is None else len(among)
    counted = zip(_of_source(examples, among), examples.weights, strict=True)
    return sum(int(weight) * count + _in_part(count, weight) for count, weight in counted)


def epoch_order(examples: Documents, seed: int, epoch: int, among: np.ndarray | None = None) -> np.ndarray:
    """Indices of the examples in the order of one epoch, int64; the same for the same arguments.

    An example of a source with weight 2 stands in it twice, one with weight 0.5 in every second epoch. All epochs
    have the same length. `among`: of these examples only, by index.
    """
    order = np.random.default_rng([seed, epoch]).permutation(epoch_length(examples, among))
    if _weighted(examples):
        return _chosen(examples, seed, epoch, among)[order]
    return order if among is None else among[order]


def _weighted(examples: Documents) -> TypeGuard[Examples]:
    return isinstance(examples, Examples) and any(weight != 1 for weight in examples.weights)


def _of_source(examples: Examples, among: np.ndarray | None) -> tuple[int, ...]:
    """Examples of each source."""
    if among is None:
        return examples.of_source
    return tuple(np.bincount(examples.sources[among], minlength=len(examples.weights)).tolist())


def _chosen(examples: Examples, seed: int, epoch: int, among: np.ndarray | None) -> np.ndarray:
    """The examples of an epoch, source by source."""
    of = examples.sources if among is None else examples.sources[among]
    each = [
        _share(_at(of == source, among), weight, seed, source, epoch)
        for source, weight in enumerate(examples.weights)
    ]
    return np.concatenate(each)


def _at(where: np.ndarray, among: np.ndarray | None) -> np.ndarray:
    return np.flatnonzero(where) if among is None else among[where]


def _share(of: np.ndarray, weight: float, seed: int, source: int, epoch: int) -> np.ndarray:
    """Each example floor(weight) times, and the fraction as a window that moves on over a shuffled ring."""
    count = _in_part(len(of), weight)
    ring = np.random.default_rng([seed, source, len(of)]).permutation(of)
    window = (np.arange(count) + epoch * count) % max(len(of), 1)
    return np.concatenate([np.tile(of, int(weight)), ring[window]])


def _in_part(count: int, weight: float) -> int:
    """How many examples of a source stand in an epoch once more than the others; one at least, where it is all."""
    more = round((weight - int(weight)) * count)
    return max(more, 1) if weight < 1 and count else more


# Micro-batches


def micro_batches(
    examples: Documents,
    rows: Sequence[int],
    *,
    max_tokens: int | None,
    max_rows: int | None,
    packing: bool,
    pad_id: int,
) -> list[Batch]:
    """The micro-batches of one optimizer step: every example in `rows` exactly once, those with most tokens first.

    Padded: rows of about the same length, filled up on the right. Packed: documents one behind the other in a single
    row, positions restarting; without an attention mask, so that transformers tells them apart by position_ids (a
    mask would join them, and so would a cache: call the model with use_cache=False). The first token of a document
    is never a label.

    Args:
        examples: what `rows` are indices of.
        rows: the examples of the step.
        max_tokens: most cells of a batch, padding included; an example that is longer stands alone.
        max_rows: most examples of a batch.
        packing: join documents instead of padding them.
        pad_id: fills up; never learned, whatever other meaning the token has.
    """
    found = groups(examples, rows, max_tokens=max_tokens, max_rows=max_rows, packing=packing)
    return [_packed(group) if packing else _padded(group, pad_id) for group in found]


def nothing(pad_id: int) -> Batch:
    """A batch of no example: one token, which is not learned, so that its loss and its gradient are zero."""
    return Batch(
        torch.tensor([[pad_id]]), torch.tensor([[IGNORE]]), torch.zeros(1, 1, dtype=torch.int64), None, ()
    )


def inputs(model: PreTrainedModel, batch: Batch, device: torch.device) -> dict[str, Any]:
    """What a model on this device is called with for a batch that is still on the CPU."""
    moved = batch.to(device)
    given = {"input_ids": moved.input_ids, "position_ids": moved.position_ids, "use_cache": False}
    given["attention_mask"] = moved.attention_mask
    return (
        given if batch.attention_mask is not None else given | varlen.told(model, batch.position_ids, device)
    )


Group = list[tuple[int, Example]]


def groups(
    examples: Documents, rows: Sequence[int], *, max_tokens: int | None, max_rows: int | None, packing: bool
) -> list[Group]:
    """Which examples are in a micro-batch together; for the arguments see `micro_batches`."""
    found = [(int(row), examples[int(row)]) for row in rows]
    found.sort(key=lambda item: -len(item[1].input_ids))
    return (_best_fit if packing else _alike)(found, max_tokens, max_rows)


def _alike(found: Group, max_tokens: int | None, max_rows: int | None) -> list[Group]:
    """Longest first, so that the first of a group is as long as its rows will be padded."""
    groups: list[Group] = []
    for item in found:
        full = not groups or (max_rows is not None and len(groups[-1]) >= max_rows)
        if not full and max_tokens is not None:
            full = len(groups[-1][0][1].input_ids) * (len(groups[-1]) + 1) > max_tokens
        if full:
            groups.append([])
        groups[-1].append(item)
    return groups


def _best_fit(found: Group, max_tokens: int | None, max_rows: int | None) -> list[Group]:
    """Longest first, each into the pack that it fills most: best-fit decreasing, at most 11/9 of the fewest packs."""
    groups: list[Group] = []
    space: list[tuple[float, int]] = []  # tokens left, and which pack; sorted
    limit = float("inf") if max_tokens is None else max_tokens
    for item in found:
        length = len(item[1].input_ids)
        at = bisect_left(space, (length, -1))
        if at == len(space):
            groups.append([])
            left, group = limit, len(groups) - 1
        else:
            left, group = space.pop(at)
        groups[group].append(item)
        if max_rows is None or len(groups[group]) < max_rows:
            insort(space, (left - length, group))
    return groups


def _labels(example: Example) -> list[int]:
    learned = [
        token if trained else IGNORE
        for token, trained in zip(example.input_ids, example.trained, strict=True)
    ]
    return [IGNORE, *learned[1:]]


def _padded(group: Group, pad_id: int) -> Batch:
    lengths = [len(example.input_ids) for _, example in group]
    shape = (len(group), max(lengths))
    ids, labels = torch.full(shape, pad_id), torch.full(shape, IGNORE)
    mask = torch.zeros(shape, dtype=torch.int64)
    for i, (_, example) in enumerate(group):
        ids[i, : lengths[i]] = torch.tensor(example.input_ids)
        labels[i, : lengths[i]] = torch.tensor(_labels(example))
        mask[i, : lengths[i]] = 1
    positions = torch.arange(shape[1]).repeat(shape[0], 1)
    return Batch(ids, labels, positions, mask, tuple(row for row, _ in group))


def _packed(group: Group) -> Batch:
    ids = [token for _, example in group for token in example.input_ids]
    labels = [label for _, example in group for label in _labels(example)]
    positions = torch.cat([torch.arange(len(example.input_ids)) for _, example in group])
    rows = tuple(row for row, _ in group)
    return Batch(torch.tensor([ids]), torch.tensor([labels]), positions[None], None, rows)


# Whether a model can be given packed documents

LEAK = 0.01
"""Largest change of a document's logits, as a share of the change that its own first token makes, that is still
rounding: experts see other numbers of rows when another document changes, which rounds otherwise."""


@torch.no_grad()
def check_isolation(model: PreTrainedModel) -> None:
    """Make sure by trying that the model keeps packed documents apart.

    Raises:
        UserError: it carries state along the row, or changes one document's logits when another one changes, or
            computes a document otherwise in a pack than alone.
    """
    if model._is_stateful:
        raise _unsafe(model, "carries its state from one document into the next")
    if "position_ids" not in signature(model.forward).parameters:
        raise _unsafe(model, "does not read positions, which tell packed documents apart")
    was_training = model.training
    model.eval()
    try:
        _probe(model)
    finally:
        model.train(was_training)


def _probe(model: PreTrainedModel) -> None:
    vocabulary: int = model.config.get_text_config().vocab_size
    first, other, second = ([(7 * i + start) % vocabulary for i in range(12)] for start in (1, 3, 5))
    changed = [(second[0] + 1) % vocabulary, *second[1:]]
    packed = _logits(model, first, second)
    itself = _distance(packed, _logits(model, first, changed))
    if _distance(packed, _logits(model, other, second)) > LEAK * itself:
        raise _unsafe(model, "lets packed documents see each other")
    if _distance(packed, _logits(model, second)) > 0.2 * itself:
        raise _unsafe(model, "does not start its positions again for each packed document")


def _logits(model: PreTrainedModel, *documents: list[int]) -> Tensor:
    """Logits of the last document of a pack, but for its first token."""
    group = [(0, Example(tuple(ids), (True,) * len(ids), "")) for ids in documents]
    batch = _packed(group)
    with reading(model, batch.to(model.device).reading):
        output = model(**inputs(model, batch, model.device))
    return output.logits[0, 1 - len(documents[-1]) :].float()


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _unsafe(model: PreTrainedModel, why: str) -> UserError:
    kind = model.config.model_type
    return UserError(f"{kind} {why}", where="data.packing", fix="set packing: false", code=ExitCode.MODEL)
