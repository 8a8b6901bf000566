"""A model as it lies in its files, tensor by tensor: for what must not depend on how large the model is.

The names in the files are not always those of the parameters, and a parameter may be made of several tensors (experts
that are fused when they are loaded). transformers knows how; its tables are asked, in both directions. Where the files
hold codes, a parameter is what they are multiplied out to.
"""

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from lora_cli import io_ops, packed
from lora_cli import model as models
from lora_cli.adapter.quantised import Quantised
from lora_cli.experts import Place, places
from lora_cli.recipe.schema import ModelRecipe
from lora_cli.tensors import KINDS, Entry, headers

NAMES = {kind: name for name, kind in KINDS.items()}
BLOCK = 1 << 24
"""Bytes that are read and written at a time."""


@dataclass(frozen=True)
class Group:
    """Tensors of the files and the parameters that they become together; mostly one and one."""

    stored: tuple[str, ...]
    parameters: tuple[str, ...]
    how: WeightConverter | None
    """None where only the name changes, if anything does."""
    patterns: tuple[str, ...] = ()
    """Of `how`, which of its patterns each stored name matched."""
    codes: packed.Form | None = None
    """How the tensors, the codes first, are those of a quantised layer; None where they are the numbers."""

    @property
    def together(self) -> bool:
        """Whether it is one tensor that has a parameter of every expert, in their order."""
        return self.how is None and len(self.parameters) > 1


@dataclass
class Stored:
    """The files of one model. Nothing is in memory but their headers."""

    recipe: ModelRecipe
    skeleton: PreTrainedModel
    """On the meta device, with the shapes that the files have."""
    multiplied: torch.dtype
    """The type that codes are multiplied out to, as in transformers: that of the config."""
    entries: dict[str, Entry]
    """In the order of the files."""
    groups: list[Group]
    others: list[str]
    """Tensors that the model has no place for."""
    files: dict[str, Any]
    """Name of a tensor -> the open file that holds it."""
    of: dict[str, Group] = field(default_factory=dict)
    """Parameter -> what it is made of; only one of two that are tied is in the files."""
    places: dict[str, Place] = field(default_factory=dict)
    """Parameter of an expert that was taken apart -> where it is in a fused one."""
    inside: dict[str, list[str]] = field(default_factory=dict)
    """Fused parameter -> those that it was taken apart into, in their order."""

    def take_apart(self) -> None:
        """Let the parameters of single experts, as the skeleton has them now, stand in for the fused ones.

        Raises:
            UserError: the files hold experts otherwise than in one tensor for all, or in tensors of their own.
        """
        self.places = places(self.skeleton)
        for name, place in self.places.items():
            self.inside.setdefault(place.fused, []).append(name)
        self.groups = [each for group in self.groups for each in self._apart(group)]
        order = {name: number for number, name in enumerate(self.entries)}
        self.groups.sort(key=lambda group: order[group.stored[0]])
        self.of = {name: group for group in self.groups for name in group.parameters}

    def _apart(self, group: Group) -> list[Group]:
        """The groups of single experts that a group of fused ones is made of."""
        names = self.inside.get(group.parameters[0])
        if names is None:
            return [group]
        if group.how is None:
            return [replace(group, parameters=tuple(names))]
        columns: dict[str, list[str]] = {pattern: [] for pattern in group.patterns}
        for stored, pattern in zip(group.stored, group.patterns, strict=True):
            columns[pattern].append(stored)
        stacked = isinstance(first := group.how.operations[0], MergeModulelist) and first.dim == 0
        if not stacked or any(len(column) != len(names) for column in columns.values()):
            what = f"{group.parameters[0]} is made of tensors that are not those of single experts"
            raise models.missing(self.recipe, what)
        rows = zip(*columns.values(), strict=True)
        return [Group(row, (name,), group.how, tuple(columns)) for row, name in zip(rows, names, strict=True)]

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The content of one tensor, some rows at a time."""
        entry = self.entries[name]
        with _damage(self.recipe):
            if not entry.shape or entry.size <= BLOCK:
                yield self.files[name].get_tensor(name)
                return
            rows, content = max(1, BLOCK * entry.shape[0] // entry.size), self.files[name].get_slice(name)
            for start in range(0, entry.shape[0], rows):
                yield content[start : min(start + rows, entry.shape[0])]

    def tensor(self, name: str) -> Tensor:
        """One tensor whole."""
        with _damage(self.recipe):
            return self.files[name].get_tensor(name)

    def reverted(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parameters -> the tensors of the files that they would be read from."""
        return revert_weight_conversion(self.skeleton, values)

    def as_stored(self, group: Group, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parameters of a group -> its tensors; of what were codes, one with all numbers."""
        name = group.parameters[0]
        if group.codes is not None:
            return {f"{group.stored[0].rpartition('.')[0]}.weight": values[name]}
        if group.how is None:
            return {group.stored[0]: values[name]}
        if name not in self.places:
            return self.reverted(values)
        fused = self.places[name].fused
        made = self.reverted(
            {fused: self.slice_of(name, values[name])}
        )  # of a mixture of one: they are called 0
        names = dict(zip(self.of[self.inside[fused][0]].stored, group.stored, strict=True))
        return {names[each]: tensor for each, tensor in made.items()}

    def slice_of(self, name: str, value: Tensor) -> Tensor:
        """A parameter of an expert as a slice [1, ...] of the fused one."""
        return self.places[name].turned(value)[None]

    def parameter(self, name: str) -> Tensor:
        """One parameter, as transformers would load it in the type it is stored in."""
        group = self.of[name]
        if group.codes is not None:
            layer = self.layer(name)
            return layer.plain.oriented(layer.dequantised(torch.float32)).to(self.multiplied).contiguous()
        if name not in self.places:
            return _forward(group, name, self.tensor, self.skeleton)[name]
        place = self.places[name]
        if group.together:
            with _damage(self.recipe):
                content = self.files[group.stored[0]].get_slice(group.stored[0])
                return place.turned(content[place.expert : place.expert + 1][0])
        return place.turned(_forward(group, place.fused, self.tensor, self.skeleton)[place.fused][0])

    def dtype(self, name: str) -> torch.dtype:
        """The type of a parameter."""
        group = self.of[name]
        return self.entries[group.stored[0]].dtype if group.codes is None else self.multiplied

    @property
    def codes(self) -> frozenset[str]:
        """The parameters that the files hold as codes."""
        return frozenset(name for name, group in self.of.items() if group.codes is not None)

    def layer(self, name: str) -> Quantised:
        """The layer around a parameter that the files hold as codes."""
        group, plain = self.of[name], self.skeleton.get_submodule(name.rpartition(".")[0])
        assert group.codes is not None, "the caller asks `codes`"
        try:
            return packed.read(group.codes, plain, group.stored, self.tensor)
        except ValueError as error:
            raise models.missing(self.recipe, f"{group.stored[0]}: {error}") from error


def open_stored(recipe: ModelRecipe) -> Stored:
    """Look at the files of a model, and at nothing but their headers.

    Raises:
        UserError: the model is missing, damaged, or not complete.
    """
    skeleton = models.plain_skeleton(recipe)
    with _damage(recipe):
        entries, files = headers(models.weight_files(recipe))
        coded = _coded(skeleton, entries)
    groups, others = _groups(recipe, skeleton, entries, coded)
    packed.forget(skeleton.config)
    multiplied = models.DTYPES[models.dtype_on_disk(recipe)]
    stored = Stored(recipe, skeleton, multiplied, entries, groups, others, files)
    stored.of = {name: group for group in groups for name in group.parameters}
    _check(stored)
    _untie_different(stored)
    return stored


@contextmanager
def _damage(recipe: ModelRecipe) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise models.missing(recipe, str(error).splitlines()[0]) from error


# ---- names --------------------------------------------------------------------------------------------------------


def _groups(
    recipe: ModelRecipe, skeleton: PreTrainedModel, entries: Mapping[str, Entry], coded: Sequence[Group]
) -> tuple[list[Group], list[str]]:
    """Which tensors become which parameters, as `from_pretrained` finds it; of the `coded` ones that is known."""
    known = skeleton.state_dict()
    conversions = get_model_conversion_mapping(skeleton)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    found: dict[str, list[tuple[str, str | None]]] = {}
    others: list[str] = []
    used = {name for group in coded for name in group.stored}
    for name in sorted(entries.keys() - used, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, skeleton.base_model_prefix, known)
        if target not in known and name in known:  # it has its final name already
            target, pattern = rename_source_key(name, [], [], skeleton.base_model_prefix, known)
        if target in known:
            found.setdefault(target, []).append((name, pattern))
        else:
            others.append(name)
    applied = [each for each in conversions if each.was_used()]
    skeleton._weight_conversions = applied  # pyright: ignore[reportArgumentType] (read by revert_weight_conversion)
    groups = [*coded]
    for target, sources in found.items():
        names, patterns = (tuple(column) for column in zip(*sources, strict=True))
        if patterns[0] is None:
            groups.append(Group(names[:1], (target,), None))
            others += names[1:]
            continue
        group = Group(names, (target,), by_pattern[patterns[0]], patterns)
        with _damage(recipe):
            made = _forward(group, target, lambda name: _empty(entries[name]), skeleton)
        groups.append(Group(names, tuple(made), group.how, patterns))
    order = {name: number for number, name in enumerate(entries)}
    return sorted(groups, key=lambda group: order[group.stored[0]]), others


def _coded(skeleton: PreTrainedModel, entries: Mapping[str, Entry]) -> list[Group]:
    """What the files hold as codes."""
    form = packed.form_of(skeleton.config)
    if form is None:
        return []
    layers = packed.layers(form, skeleton, {name: entry.dtype for name, entry in entries.items()})
    return [Group(names, (f"{layer}.weight",), None, codes=form) for layer, names in layers.items()]


def _forward(
    group: Group, target: str, read: Callable[[str], Tensor], skeleton: PreTrainedModel
) -> dict[str, Tensor]:
    """What transformers makes of a group; `target` is the first parameter, or what would be fused of such groups."""
    if group.how is None:
        return {target: read(group.stored[0])}
    how = copy.deepcopy(group.how)
    for name, pattern in zip(group.stored, group.patterns, strict=True):
        how.add_tensor(target, name, pattern, cast(Any, read(name)))  # a Future, or what it gives
    made = how.convert(target, model=skeleton, config=skeleton.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _empty(entry: Entry) -> Tensor:
    return torch.empty(entry.shape, dtype=entry.dtype, device="meta")


def _check(stored: Stored) -> None:
    """Refuse a model with parameters that its files do not hold, or hold in another shape."""
    known = stored.skeleton.state_dict(keep_vars=True)
    held = {id(known[name]) for name in stored.of}
    ignored = stored.skeleton._keys_to_ignore_on_load_missing or ()
    absent = [name for name, p in known.items() if id(p) not in held and not _matches(name, ignored)]
    if absent:
        what = f"{len(absent)} weights are missing, such as {sorted(absent)[0]}"
        raise models.missing(stored.recipe, what)
    for group in stored.groups:
        if group.codes is not None:
            continue  # they are held against the shape when they are read
        first = group.parameters[0]
        made = _forward(group, first, lambda name: _empty(stored.entries[name]), stored.skeleton)
        for name, value in made.items():
            if name in known and value.shape != known[name].shape:
                shapes = f"{tuple(value.shape)} instead of {tuple(known[name].shape)}"
                raise models.missing(
                    stored.recipe, f"{name} has another shape than config.json says: {shapes}"
                )
            if name in known and known[name].is_floating_point() and not value.is_floating_point():
                raise models.missing(stored.recipe, f"{name} is stored as codes, and what they mean is not")


def _untie_different(stored: Stored) -> None:
    """Ends that the files hold twice, differently, are two whatever the config says, as in transformers."""
    ends = models.ends_of(stored.skeleton)
    names = [f"{end}.weight" for end in (ends.embeddings, ends.head)]
    if not ends.tied or not all(name in stored.of for name in names):
        return
    blocks = (stored.blocks(stored.of[name].stored[0]) for name in names)
    if not all(torch.equal(*pair) for pair in zip(*blocks, strict=True)):
        models._untie(stored.skeleton)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


# ---- writing ------------------------------------------------------------------------------------------------------


def write(
    folder: Path, entries: Iterable[Entry], content: Callable[[Entry], Iterable[Tensor]], most: int
) -> None:
    """Write safetensors of at most `most` bytes (a larger tensor has one to itself), and their index.

    What is written is known beforehand by name, type and shape, so one block at a time is in memory.

    Args:
        folder: exists; a temporary one, see `io_ops.new_folder`.
        entries: what is written, in this order as far as the format lets it.
        content: gives a tensor, in blocks of its rows.
        most: bytes of a file.
    """
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(each.size for each in shards[-1]) + entry.size > most:
            shards.append([])
        shards[-1].append(entry)
    names = [_shard_name(number, len(shards)) for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        # As safetensors itself writes them: with the wide types first, every tensor starts at a multiple of its width.
        _write_shard(folder / name, sorted(shard, key=lambda each: -each.dtype.itemsize), content)
    if len(shards) > 1:
        held = {each.name: name for name, shard in zip(names, shards, strict=True) for each in shard}
        total = sum(each.size for shard in shards for each in shard)
        index = {"metadata": {"total_size": total}, "weight_map": held}
        io_ops.write_json(folder / models.SAFE_WEIGHTS_INDEX_NAME, index)


def _shard_name(number: int, count: int) -> str:
    return models.SAFE_WEIGHTS_NAME if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"


def _write_shard(path: Path, shard: list[Entry], content: Callable[[Entry], Iterable[Tensor]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in shard:
        start, end = end, end + entry.size
        about = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
        header[entry.name] = about
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with io_ops.appending(path) as append:
        append(len(text).to_bytes(8, "little") + text)
        for entry in shard:
            size = 0
            for block in content(entry):
                assert block.dtype == entry.dtype, f"{entry.name} is {block.dtype}, not {entry.dtype}"
                size += block.numel() * block.element_size()
                append(raw(block))
            assert size == entry.size, f"{entry.name} has {size} bytes, not {entry.size}"


def raw(block: Tensor) -> memoryview:
    """The bytes of a tensor, not copied."""
    return block.detach().contiguous().flatten().view(torch.uint8).numpy().data
