"""YAML files and overrides -> Recipe, with the place that every value came from.

Paths in a recipe are relative to the current directory, as in the shell; only `extends` is relative to its file.
"""

import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from itertools import chain, islice
from pathlib import Path
from typing import Any

from lora_cli import parts
from lora_cli.errors import UserError
from lora_cli.presets import PRESETS
from lora_cli.recipe import explain, layers, read
from lora_cli.recipe.read import Marked
from lora_cli.recipe.schema import OutputRecipe, Part, Recipe, Section, axes
from lora_cli.recipe.words import Keys, dotted, shown

MAX_FILES = 8
MOST = 200
"""Mistakes that are told at once; who made more did not mean to write a recipe."""
PLACE = re.compile(r"(?:\$\{\w+\} at )?(?P<file>.*):(?P<line>\d+)")
VARIANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+-]{0,39}")
COMPARISONS = {
    "output": "each run has a folder of its own below that of the comparison, --output",
    "compare": "variants have no variants; give each a name at the same level",
    "train.seed": "--seeds N gives all variants the same N seeds",
}
"""Keys that a variant cannot set, and what to do instead."""


@dataclass(frozen=True)
class Loaded:
    """A checked recipe and where it came from."""

    recipe: Recipe
    origins: Mapping[str, str]
    """Dotted key -> `file:line`, `${NAME} at file:line`, `--set` or `--output`; keys absent here are defaults."""
    name: str
    """The file's name without its ending; of a variant its own name."""
    variants: Mapping[str, "Loaded"] = field(default_factory=dict[str, "Loaded"])
    """The section `compare`, each variant laid over the rest of the recipe."""

    def origin(self, key: str) -> str:
        """Where the value at a dotted key came from, written in short or in full; empty for a default."""
        above = [key.rsplit(".", cut)[0] for cut in range(key.count(".") + 1)]
        written = next((each for each in above if each in self.origins), None)
        below = (each for each in self.origins if each.startswith(f"{key}."))
        return self.origins.get(written or next(below, ""), "")


def load(path: Path, overrides: Sequence[str] = (), output: Path | None = None) -> Loaded:
    """Read a recipe, the files it extends, and what the command line sets on top.

    Args:
        path: the YAML file.
        overrides: `key=value`, keys dotted; a later one wins over an earlier one.
        output: wins over output.dir.

    Raises:
        UserError: with every mistake of the files and overrides, each with its place.
    """
    tree = _with_parents(path)
    on_top = [_override(text) for text in overrides]
    if output is not None:
        on_top.append(layers.nested("output.dir", Marked(str(output), "--output")))
    tree = layers.over(tree, layers.spread(reduce(layers.merged, on_top, Marked({}, "--set"))))
    _refuse(_mistakes(tree))
    return replace(_loaded(tree, path.stem), variants=_variants(tree))


def check_parts(loaded: Loaded) -> None:
    """Import the parts that the recipe names and check the settings under their names.

    Raises:
        UserError: with every wrong setting.
    """
    found: list[UserError] = []
    for key, axis in axes().items():
        section, _, name = key.partition(".")
        written = getattr(getattr(loaded.recipe, section), name)
        for part in written if isinstance(written, tuple) else [written]:
            if isinstance(part, Part):
                settings = settings_of(axis, part.name)
                top = (section, name, part.name)
                found += explain.complaints(settings, part.settings, partial(_place_in, loaded), top)
    if found:
        raise UserError.several(sorted(found, key=_position))


@contextmanager
def placing(loaded: Loaded) -> Generator[None]:
    """Inside the block an error about a key also tells where the recipe has it."""
    try:
        yield
    except UserError as error:
        raise error.placed(loaded.origin) from error


def settings_of(axis: str, name: str) -> type[Section]:
    """The settings that a part's file declares; importing it may import torch."""
    settings = getattr(parts.load(axis, name), "Settings", Section)
    assert issubclass(settings, Section), f"Settings of {axis} {name} must be a Section"
    return settings


def _with_parents(path: Path, children: tuple[Path, ...] = ()) -> Marked:
    """The file over the one it extends, over the one that extends ..."""
    tree = _sections(path)
    if "extends" not in tree.value:
        return tree
    children = (*children, path.resolve())
    extends, tree = tree.value["extends"], layers.without(tree, ("extends",))
    parent = _parent(path, extends, children)
    try:
        base = _with_parents(parent, children)
    except UserError as error:
        if error.where != str(parent):
            raise
        raise UserError(f"extends: {parent}: {error.what}", where=extends.where, fix=error.fix) from error
    return layers.over(base, tree)


def _sections(path: Path) -> Marked:
    """One file, which must be a mapping."""
    tree = layers.spread(read.read_file(path))
    if tree.error is not None:
        raise tree.error
    if not isinstance(tree.value, dict):
        what = "the recipe is empty" if tree.value is None else "a recipe is a mapping with sections"
        raise UserError(what, where=tree.where, fix="`lora init` writes one")
    return tree


def _parent(path: Path, extends: Marked, children: tuple[Path, ...]) -> Path:
    if extends.error is not None:
        raise extends.error
    if not isinstance(extends.value, str) or not extends.value:
        raise UserError("extends: expected the path of one recipe", where=extends.where)
    parent = path.parent / extends.value
    if parent.resolve() in children:
        raise UserError(f"extends goes round in a circle: {parent} extends this file", where=extends.where)
    if len(children) >= MAX_FILES:
        raise UserError(f"extends goes deeper than {MAX_FILES} files", where=extends.where)
    return parent


def _override(text: str) -> Marked:
    key, equals, value = text.partition("=")
    where = f"--set {text}"
    steps = key.strip().split(".")
    if not equals or not all(steps) or len(steps) > read.MAX_DEPTH:
        raise UserError("expected key=value", where=where, fix="for example --set adapter.r=8")
    return layers.nested(key.strip(), read.read_value(value, where))


def _loaded(tree: Marked, name: str) -> Loaded:
    """A tree without mistakes as a recipe."""
    recipe = Recipe.model_validate(layers.plain(tree))
    if recipe.output.dir is None:
        recipe = recipe.model_copy(update={"output": OutputRecipe(dir=f"runs/{name}")})
    return Loaded(recipe, _origins(tree), name)


def _variants(tree: Marked) -> dict[str, Loaded]:
    """Each variant laid over the recipe.

    Raises:
        UserError: with the mistakes of all of them.
    """
    compare, alone = tree.child("compare"), layers.without(tree, ("compare",))
    written: dict[str, Marked] = compare.value if compare is not None else {}
    if compare is not None:
        _check_size(alone, compare)
    trees = {name: layers.over(alone, node) for name, node in written.items()}
    misplaced = (error for name, node in written.items() for error in _not_for_variants(name, node))
    wrong = (error for name, each in trees.items() for error in _mistakes(each, ("compare", name)))
    _refuse(chain(misplaced, wrong))
    return {name: _loaded(each, name) for name, each in trees.items()}


def _check_size(recipe: Marked, compare: Marked) -> None:
    """A small file with many variants of many values would take as long as a large one."""
    if len(compare.value) * sum(1 for _ in layers.walk(recipe)) > read.MAX_NODES:
        what = f"compare: more than {read.MAX_NODES} values, the recipe counted once for each variant"
        raise UserError(what, where=compare.where, fix="compare fewer variants at a time")


def _not_for_variants(name: str, variant: Marked) -> Iterator[UserError]:
    """A name that cannot be a folder's, and keys that are the comparison's."""
    if not VARIANT.fullmatch(name):
        fix = "name it with letters, digits, '_', '+' and '-', at most 40"
        what = f"{dotted('compare', name)}: not a name of a variant"
        yield UserError(what, where=variant.where, fix=fix)
    for keys, node in layers.walk(variant):
        if (key := ".".join(map(str, keys))) in COMPARISONS:
            what = f"{dotted('compare', name, *keys)}: a variant cannot set this"
            yield UserError(what, where=node.where, fix=COMPARISONS[key])


def _refuse(mistakes: Iterator[UserError]) -> None:
    found = sorted(islice(mistakes, MOST), key=_position)
    if (another := next(mistakes, None)) is not None:
        found.append(UserError(f"more than {MOST} mistakes", where=another.where, fix="mend these first"))
    if found:
        raise UserError.several(found)


def _mistakes(tree: Marked, top: Keys = ()) -> Iterator[UserError]:
    """Everything that is wrong in the tree of a recipe; `top` is what keys are called by in front."""
    unusable = {keys: node.error for keys, node in layers.walk(tree) if node.error is not None}
    for keys, error in unusable.items():
        yield UserError(f"{dotted(*top, *keys)}: {error.what}", where=error.where, fix=error.fix)
    yield from _unknown_method(tree, top)
    where = partial(_place_below, tree, len(top))
    yield from explain.complaints(Recipe, layers.plain(tree), where, top, broken=unusable)


def _unknown_method(tree: Marked, top: Keys) -> Iterator[UserError]:
    keys = ("adapter", "method")
    method = dict(layers.walk(tree)).get(keys)
    if method is not None and isinstance(method.value, str) and method.value not in ("", *PRESETS):
        what = f"{dotted(*top, *keys)}: unknown method {shown(method.value)}"
        yield UserError(what, where=method.where, fix=parts.did_you_mean(method.value, PRESETS))


def _place_below(tree: Marked, depth: int, keys: Keys) -> str:
    return layers.place(tree, keys[depth:])


def _origins(tree: Marked) -> dict[str, str]:
    """The place of every value that was written. A section is none: most of what is in it may be defaults."""
    return {
        ".".join(map(str, keys)): "--set" if node.where.startswith("--set ") else node.where
        for keys, node in layers.walk(tree)
        if not isinstance(node.value, dict) or (not node.value and len(keys) > 1)
    }


def _place_in(loaded: Loaded, keys: tuple[Any, ...]) -> str:
    key = ".".join(map(str, keys))
    return loaded.origin(key) or key


def _position(error: UserError) -> tuple[str, int]:
    """File by file, line by line, the command line last."""
    found = None if error.where.startswith("--") else PLACE.fullmatch(error.where)
    return (found["file"], int(found["line"])) if found else ("\U0010ffff", 0)
