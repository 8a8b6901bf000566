"""The files of a base -> the files of the merged model, tensor by tensor; what no piece changes is copied."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from lora_cli import parts
from lora_cli import stored as on_disk
from lora_cli.adapter import inject
from lora_cli.adapter.delta import Shared
from lora_cli.adapter.pieces import Piece, merged, pieces
from lora_cli.adapter.plan import Plan
from lora_cli.adapter.saved import Saved
from lora_cli.errors import ExitCode, UserError
from lora_cli.run.weights import Onto, Weights
from lora_cli.stored import Entry, Group

SHARD = 4 * 10**9
"""Bytes of a file."""


@dataclass
class Rewriting:
    """A model on its way from disk to disk. Only the piece in work is in memory."""

    weights: Weights
    saved: Saved
    plan: Plan
    dtype: torch.dtype | None
    """Of what is written; None: as it is stored."""
    pieces: dict[str, Piece]
    """Parameter -> the piece that changes it."""
    shared: Shared
    onto: Onto
    tied: bool = False
    """Whether both ends are one tensor when all is merged."""
    ready: dict[str, Tensor] = field(default_factory=dict)
    """Parameters that are merged and not yet written."""
    digests: dict[str, str] = field(default_factory=dict)
    """Of every tensor, as it was written."""
    lost: dict[str, float] = field(default_factory=dict)
    """Layer -> ‖stored − W‖ / ‖W − W0‖."""
    errors: dict[str, float] = field(default_factory=dict)
    """Layer -> ‖merged − live‖ / ‖live‖ of what it computes, before rounding."""
    away: dict[Onto, dict[str, float]] = field(default_factory=dict)
    """Onto which weights -> layer that was quantised in training -> how far what is stored of it is from what was
    trained, see `inject.distance`."""


def prepare(
    weights: Weights, saved: Saved, plan: Plan, dtype: torch.dtype | None, onto: Onto = "trained"
) -> Rewriting:
    """Find out what changes.

    Raises:
        UserError: a layer shares its weight with others.
    """
    by_name = {name: piece for piece in pieces(plan, weights.language.model) for name in piece.parameters}
    for name in by_name:
        if name not in weights.stored.of and name not in weights.held_as:
            what = "its weight is that of another layer too, and merging one would change the other"
            raise UserError(what, where=name, code=ExitCode.MODEL)
    work = Rewriting(weights, saved, plan, dtype, by_name, inject.shared_of(plan), onto)
    work.tied = _stay_tied(work)
    return work


def write(work: Rewriting, folder: Path) -> dict[str, Entry]:
    """Write all tensors; return what was written."""
    planned = {entry.name: (entry, group) for group in _in_order(work) for entry in _entries(work, group)}
    kept: dict[str, Tensor] = {}  # of the group in work

    def content(entry: Entry) -> Iterator[Tensor]:
        _, group = planned[entry.name]
        if group is None or not _changes(work, group):
            blocks: Iterable[Tensor] = (
                inject.rounded(block, entry.dtype, entry.name) if block.dtype != entry.dtype else block
                for block in work.weights.stored.blocks(entry.name)
            )
        elif group.together:
            laid = work.weights.stored.slice_of
            blocks = (laid(name, _value(work, name)) for name in group.parameters)
        else:
            if entry.name not in kept:
                kept.update(_tensors(work, group))
            blocks = _blocks(kept.pop(entry.name))
        yield from _noting(work, entry, blocks)

    on_disk.write(folder, [entry for entry, _ in planned.values()], content, SHARD)
    return {name: entry for name, (entry, _) in planned.items()}


def digest(entry: Entry, blocks: Iterable[Tensor]) -> str:
    """A hash of type, shape and content of a tensor."""
    found = hashlib.sha256()
    for block in blocks:
        found.update(on_disk.raw(block))
    return f"{entry.dtype} {entry.shape} {found.hexdigest()}"


def _noting(work: Rewriting, entry: Entry, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
    found = hashlib.sha256()
    for block in blocks:
        found.update(on_disk.raw(block))
        yield block
    work.digests[entry.name] = f"{entry.dtype} {entry.shape} {found.hexdigest()}"


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    if not tensor.shape:
        yield tensor
        return
    size = max(1, tensor.numel() * tensor.element_size())
    yield from tensor.split(max(1, on_disk.BLOCK * tensor.shape[0] // size))


# ---- what is written ----------------------------------------------------------------------------------------------


def _in_order(work: Rewriting) -> list[Group | None]:
    """All groups in the order of the files, but those of one piece together; None stands for what has no place."""
    stored = work.weights.stored
    added = [] if work.tied else [name for name in work.weights.held_as if name in work.weights]
    extra = {name: Group((_own_name(work, name),), (name,), None) for name in added}
    of = {**stored.of, **extra}
    found: dict[int, Group] = {}
    for group in [*stored.groups, *extra.values()]:
        # A weight before its bias: what is merged and waits for its turn is then the smaller of both.
        for name in group.parameters:
            for other in work.pieces[name].parameters if name in work.pieces else ():
                if other in of:
                    found.setdefault(id(of[other]), of[other])
        found.setdefault(id(group), group)
    return [*found.values(), None]


def _own_name(work: Rewriting, parameter: str) -> str:
    """What the files call a parameter that they did not hold."""
    (name,) = work.weights.stored.reverted({parameter: torch.empty(0, device="meta")})
    return name


def _changes(work: Rewriting, group: Group) -> bool:
    return any(name in work.pieces or not work.weights.as_stored(name) for name in group.parameters)


def _entries(work: Rewriting, group: Group | None) -> list[Entry]:
    stored = work.weights.stored
    if group is None:
        return [stored.entries[name] for name in stored.others]
    if _changes(work, group) and group.together:
        (entry,) = (stored.entries[name] for name in group.stored)
        return [replace(entry, dtype=_dtype(work, group.parameters[0]))]
    if _changes(work, group):
        model = work.weights.language.model
        shapes = {name: model.get_parameter(name).shape for name in group.parameters}
        made = {
            name: torch.empty(shape, dtype=_dtype(work, name), device="meta")
            for name, shape in shapes.items()
        }
        found = stored.as_stored(group, made)
        return [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()]
    found = [stored.entries[name] for name in group.stored]
    trained = any(name in work.weights for name in group.parameters)  # and not a buffer
    if work.dtype is None or not trained:
        return found
    return [replace(entry, dtype=work.dtype) if entry.dtype.is_floating_point else entry for entry in found]


def _dtype(work: Rewriting, name: str) -> torch.dtype:
    """One type for all of a piece, as a layer has one; an expert's parameters are parts of several tensors."""
    alone = name in work.pieces and name not in work.weights.stored.places
    first = work.pieces[name].parameters[0] if alone else name
    return work.dtype or work.weights.dtype(first)


def _tensors(work: Rewriting, group: Group) -> dict[str, Tensor]:
    return work.weights.stored.as_stored(group, {name: _value(work, name) for name in group.parameters})


def _value(work: Rewriting, name: str) -> Tensor:
    """A parameter of the merged model; the piece that it is of is merged when the first of them is asked for."""
    if name not in work.pieces:
        if name not in work.weights.quantised:
            return inject.rounded(work.weights[name], _dtype(work, name), name)
        made: dict[Onto, dict[str, Tensor]] = {o: {name: read(name)} for o, read in _ways(work).items()}
        _measure(work, name, made)
        return inject.rounded(made[work.onto][name], _dtype(work, name), name)
    if name not in work.ready:
        _merge(work, work.pieces[name])
    return work.ready.pop(name)


def _merge(work: Rewriting, piece: Piece) -> None:
    model, ways = work.weights.language.model, _ways(work)
    made = merged(model, piece, work.saved, ways[work.onto], work.shared)
    keeps_codes = hasattr(parts.load("delta", piece.plan.method.delta.name), "KEEPS_CODES")
    for name in piece.parameters:
        stored = inject.rounded(made.after[name], _dtype(work, name), name.removesuffix(".weight"))
        work.ready[name] = stored
        if keeps_codes and work.onto == "trained":
            work.weights.compare_codes(name, stored)
        for label in (label for label, of in made.losing.items() if of == name):
            work.lost[label] = inject.lost_by(stored, made.after[name], made.before[name])
            work.errors[label] = made.error
    for name in work.weights.quantised.intersection(piece.parameters):
        others: dict[Onto, dict[str, Tensor]] = {
            onto: merged(model, piece, work.saved, read, work.shared).after
            for onto, read in ways.items()
            if onto != work.onto
        }
        _measure(work, name, {work.onto: made.after, **others})


def _ways(work: Rewriting) -> dict[Onto, Callable[[str], Tensor]]:
    """Onto which weights -> how they are read; there are no original ones where the files hold codes."""
    weights = work.weights
    stored_as_codes = weights.quantised and not weights.formats
    found: dict[Onto, Callable[[str], Tensor]] = {"trained": weights.trained}
    return found if stored_as_codes else {**found, "original": weights.original}


def _measure(work: Rewriting, name: str, made: Mapping[Onto, Mapping[str, Tensor]]) -> None:
    """Note how far what is stored of a layer would be from what was trained, onto whichever weights."""
    for onto, after in made.items():
        stored = {key: W.to(_dtype(work, key)) for key, W in after.items()}
        work.away.setdefault(onto, {})[name.rpartition(".")[0]] = inject.distance(stored, made["trained"])


def _stay_tied(work: Rewriting) -> bool:
    """Whether ends that are one tensor still are, when all is merged."""
    ends = work.weights.language.ends
    names = [f"{end}.weight" for end in (ends.embeddings, ends.head)]
    if not ends.tied or not any(name in work.pieces for name in names):
        return ends.tied
    same = torch.equal(*(_value(work, name) for name in names))
    work.ready.clear()
    return same
