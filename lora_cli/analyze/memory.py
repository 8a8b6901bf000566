"""Where the memory of a run goes, in bytes, and what could be done about it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_cli.analyze.devices import Device
from lora_cli.analyze.rehearse import Rehearsal, Rows
from lora_cli.recipe.schema import TrainRecipe

PER_WEIGHT = {
    "bfloat16": 2.0,
    "float16": 2.0,
    "float32": 4.0,
    "int8": 1.0 + 4 / 4096,
    "int4": 5.5 / 8,
    "nf4": 4.127 / 8,
    "nf": 4.127 / 8,
}
"""Bytes of a stored weight. int8: a float32 scale a row, of about 4,096 weights. nf4, and nf where the recipe has no
`model.bits`: 4 bits, and 8 for a block of 64, and 32 for each 256 of these. arXiv:2305.14314 int4: 4 bits, and 48 for a
group of 32."""


@dataclass(frozen=True)
class Memory:
    """Of one process, in bytes."""

    process: float
    """Before it holds a tensor: libraries, and the context of a GPU."""
    weights: float
    adapter: float
    gradients: float
    optimizer: float
    activations: float
    """Kept for the backward pass."""
    passing: float
    """What is there for a moment beside them: logits, gradients of activations, a block that is computed again."""
    allocator: float
    """What it holds without use."""

    @property
    def peak(self) -> float:
        """All of them."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Case:
    """What decides about the memory of a run."""

    rows: Rows
    """The largest micro-batch."""
    several: bool
    """Whether a step has more than one, so that gradients wait while activations are there."""
    recomputed: int
    """Blocks."""


def largest(rehearsal: Rehearsal, train: TrainRecipe, steps: Sequence[Sequence[Rows]]) -> Case:
    """The micro-batch that takes most, in a step that has others beside it if there is one."""
    rows = max((rows for step in steps for rows in step), key=lambda rows: (rows.cells, rows.trained))
    asked = train.gradient_checkpointing
    recomputed = len(rehearsal.blocks) if asked is True else int(asked)
    return Case(rows, any(len(step) > 1 for step in steps), recomputed)


def at_most(model: PreTrainedModel, tokens: int, longest: int) -> float:
    """Bytes that no run of a model takes, found without rehearsing: many times too many for most."""
    weights = sum(p.numel() for p in model.parameters())
    linear = (m.weight.shape for m in model.modules() if isinstance(m, nn.Linear | Conv1D))
    features = sum(sum(shape) for shape in linear)
    scores = model.config.num_hidden_layers * model.config.num_attention_heads * longest
    return 1e9 + 20 * weights + tokens * (24 * features + 12 * scores)


def memory(rehearsal: Rehearsal, case: Case, device: Device) -> Memory:
    """Of a run on one device."""
    held, cost = rehearsal.held, rehearsal.cost(case.rows, case.recomputed)
    # Those of the rows before, and where some tensors learn from held-out rows those of the others.
    waiting = int(case.several) + int(rehearsal.run.bilevel)
    gradients, kept, passing = held.gradients * waiting, cost.kept, cost.peak - cost.kept
    between, begin = _beside(rehearsal, case)
    if gradients + kept + passing < held.gradients + between:  # as where a large model trains in full
        gradients, kept, passing = held.gradients, 0.0, between
    passing = max(passing, begin - (held.adapter + gradients + held.optimizer + kept))
    found = Memory(
        process=device.floor,
        weights=held.weights,
        adapter=held.adapter + rehearsal.run.later,
        gradients=gradients,
        optimizer=held.optimizer,
        activations=kept,
        passing=passing,
        allocator=device.gaps * rehearsal.cost(case.rows).kept,
    )
    return stored(found, rehearsal, rehearsal.base) if rehearsal.base else found


def _beside(rehearsal: Rehearsal, case: Case) -> tuple[float, float]:
    """Bytes that are there for a moment between two steps, and before the first, where there is no adapter yet."""
    run, longest = rehearsal.run, max(case.rows.lengths)
    looks = [rehearsal.looking(kind, longest) for kind, rows in run.looks.items() if rows and kind != "loss"]
    between = max(rehearsal.update_peak - rehearsal.held.optimizer, *looks, 0.0)
    return between, rehearsal.looking(run.measures, longest) if run.measures else 0.0


def stored(found: Memory, rehearsal: Rehearsal, kind: str) -> Memory:
    """The same with the linear layers of the blocks stored as `kind`, one of them laid out to compute with."""
    matrices = _matrices(rehearsal)
    saved = sum(p.numel() * (p.element_size() - _per_weight(rehearsal, kind)) for p in matrices)
    largest = max((p.nbytes for p in matrices), default=0)
    return replace(found, weights=found.weights - saved, passing=found.passing + largest)


def decoding(rehearsal: Rehearsal) -> float:
    """Bytes that are read and written in a micro-batch to lay out quantised weights, forward and backward."""
    if rehearsal.base is None:
        return 0.0
    coded = _per_weight(rehearsal, rehearsal.base)
    return 2 * sum(p.numel() * (p.element_size() + coded) for p in _matrices(rehearsal))


def _per_weight(rehearsal: Rehearsal, kind: str) -> float:
    """Bytes of a weight stored as `kind`, as many as are asked for where that is what the recipe stores it as."""
    if rehearsal.bits is not None and kind == rehearsal.base:
        return rehearsal.bits / 8
    return PER_WEIGHT[kind]


def sharded(found: Memory, rehearsal: Rehearsal, devices: int) -> Memory:
    """The same with the base shared out over devices; each has the block at hand, and the next, whole.

    As `train.parallel: fsdp` does it, with the adapter whole on each; the two ends are whole while a step computes.
    """
    if devices == 1:
        return found
    blocks, ends = _shared(rehearsal)
    away = (sum(blocks) + ends) * (1 - 1 / devices)
    whole = ends + 2 * max(blocks, default=0)
    return replace(found, weights=found.weights - away, passing=found.passing + whole)


def gathered(rehearsal: Rehearsal) -> float:
    """Bytes of a base that is shared out which come together in a micro-batch: the blocks twice, the ends once."""
    blocks, ends = _shared(rehearsal)
    return 2 * sum(blocks) + ends


def _shared(rehearsal: Rehearsal) -> tuple[list[float], float]:
    """Bytes of each block of the base, as it is kept, and of what is in none."""
    kind = rehearsal.base
    found = [[*_frozen(rehearsal, block)] for block in rehearsal.blocks]
    ends = sum(p.nbytes for p in _frozen(rehearsal, rehearsal.model)) - sum(
        p.nbytes for each in found for p in each
    )
    blocks = [
        sum(p.numel() * _per_weight(rehearsal, kind) if kind and p.ndim == 2 else p.nbytes for p in each)
        for each in found
    ]
    return blocks, ends


def blocks_to_recompute(rehearsal: Rehearsal, case: Case, device: Device, limit: float) -> int | None:
    """The fewest blocks with which the run takes no more than `limit`; None where all of them are not enough."""

    def peak(count: int) -> float:
        return memory(rehearsal, replace(case, recomputed=count), device).peak

    return _least(case.recomputed, len(rehearsal.blocks), lambda count: peak(count) <= limit)


def tokens_at_once(rehearsal: Rehearsal, case: Case, device: Device, limit: float) -> Case | None:
    """With the most tokens at once that take no more than `limit`; None where the longest row does not fit."""
    cases = [
        replace(case, rows=_part(case.rows, tokens), several=True)
        for tokens in _halves(case.rows.cells, max(case.rows.lengths))
    ]
    if not cases:
        return None
    first = _least(0, len(cases) - 1, lambda index: memory(rehearsal, cases[index], device).peak <= limit)
    return None if first is None else cases[first]


def smaller(rehearsal: Rehearsal, case: Case, device: Device, limit: float) -> Case | None:
    """As few blocks recomputed as it takes; all of them, and fewer tokens at once, where that is not enough."""
    blocks = blocks_to_recompute(rehearsal, case, device, limit)
    if blocks is not None:
        return replace(case, recomputed=blocks)
    return tokens_at_once(rehearsal, replace(case, recomputed=len(rehearsal.blocks)), device, limit)


def _halves(tokens: int, least: int) -> Iterator[int]:
    """Half of it, half of that, ... as long as the longest row."""
    while tokens > least:
        tokens = max(tokens // 2, least)
        yield tokens


def _part(rows: Rows, tokens: int) -> Rows:
    """A micro-batch of so many tokens of the same kind, the longest row in it."""
    longest = max(rows.lengths)
    lengths, cells = [longest], longest
    for length in rows.lengths[1:]:
        more = length if rows.packed else longest
        if cells + more <= tokens:
            lengths.append(length)
            cells += more
    share = rows.trained * sum(lengths) / sum(rows.lengths)
    return Rows(tuple(lengths), max(round(share), 1), rows.packed)


def _least(low: int, high: int, fits: Callable[[int], bool]) -> int | None:
    """The smallest number between the two for which it fits, if it fits for all above."""
    if not fits(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low


def _matrices(rehearsal: Rehearsal) -> Sequence[Tensor]:
    """What can be stored quantised."""
    return [p for block in rehearsal.blocks for p in _frozen(rehearsal, block) if p.ndim == 2]


def _frozen(rehearsal: Rehearsal, block: nn.Module) -> list[Tensor]:
    """What a block has of the base, without what the adapter keeps frozen beside it."""
    return [p for p in block.parameters() if not p.requires_grad and id(p) not in rehearsal.tensors]
