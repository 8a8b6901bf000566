"""Trees of marked values laid over one another: a file over the one it extends, overrides over files."""

from collections.abc import Iterator
from dataclasses import replace
from functools import reduce
from typing import Any

from lora_cli.errors import UserError
from lora_cli.recipe.read import MAX_DEPTH, Marked
from lora_cli.recipe.schema import EXCLUSIVE, axes
from lora_cli.recipe.words import Keys


def over(base: Marked, top: Marked) -> Marked:
    """`top` wins: mappings key by key, lists and parts whole; it also takes back what its own keys exclude."""
    for pair in EXCLUSIVE:
        for kept, rival in (pair, pair[::-1]):
            if _is_set(top, kept) and not _is_set(top, rival):
                base = without(base, tuple(rival.split(".")))
    return merged(base, top)


def merged(base: Marked, top: Marked, keys: Keys = ()) -> Marked:
    """`top` on `base`, key by key; the keys of `top` come first, because in patterns the first match wins."""
    if not isinstance(base.value, dict) or not isinstance(top.value, dict) or _other_part(base, top, keys):
        return top
    value = {
        key: merged(base.value[key], node, (*keys, key)) if key in base.value else node
        for key, node in top.value.items()
    }
    rest = {key: node for key, node in base.value.items() if key not in value}
    # a section stands where a file has it: nobody adds a missing key to the command line
    where = base.where if top.where.startswith("--") else top.where
    return Marked({**value, **rest}, where, top.error or base.error)


def spread(tree: Marked) -> Marked:
    """The tree with the variants of `compare` in sections: `adapter.r: 8` is `adapter: {r: 8}`, nothing is `{}`."""
    compare = tree.child("compare")
    if compare is None or not isinstance(compare.value, dict):
        return tree
    variants = {name: _in_sections(node) for name, node in compare.value.items()}
    return replace(tree, value={**tree.value, "compare": replace(compare, value=variants)})


def nested(dotted: str, node: Marked) -> Marked:
    """The value under its dotted key, as it would stand in a file."""
    for key in reversed(dotted.split(".")):
        node = Marked({key: node}, node.where)
    return node


def without(tree: Marked, keys: Keys) -> Marked:
    """The tree without the value at `keys`."""
    if not isinstance(tree.value, dict) or keys[0] not in tree.value:
        return tree
    rest = {key: node for key, node in tree.value.items() if key != keys[0]}
    if len(keys) > 1:
        rest = {**tree.value, keys[0]: without(tree.value[keys[0]], keys[1:])}
    return replace(tree, value=rest)


def plain(tree: Marked) -> Any:
    """The values alone, lists as tuples, as the strict models want them."""
    if isinstance(tree.value, dict):
        return {key: plain(node) for key, node in tree.value.items()}
    if isinstance(tree.value, list):
        return tuple(plain(node) for node in tree.value)
    return tree.value


def walk(tree: Marked, keys: Keys = ()) -> Iterator[tuple[Keys, Marked]]:
    """Every value with the way to it, from the top down; nothing inside a value that cannot be used."""
    yield keys, tree
    if tree.error is not None or not isinstance(tree.value, dict | list):
        return
    children = tree.value.items() if isinstance(tree.value, dict) else enumerate(tree.value)
    for key, node in children:
        yield from walk(node, (*keys, key))


def place(tree: Marked, keys: Keys) -> str:
    """Where the value at `keys` stands, or the nearest one above it."""
    where = tree.where
    node: Marked | None = tree
    for key in keys:
        node = node and node.child(key)
        where = node.where if node else where
    return where


def _in_sections(variant: Marked) -> Marked:
    if variant.value is None:
        return replace(variant, value={})
    if not isinstance(variant.value, dict):
        return variant
    sections = (_in_section(key, node) for key, node in variant.value.items())
    return replace(reduce(_joined, sections, replace(variant, value={})), where=variant.where)


def _in_section(key: str, node: Marked) -> Marked:
    """A key of many dots is as deep as it looks."""
    if key.count(".") < MAX_DEPTH:
        return nested(key, node)
    error = UserError(f"nested deeper than {MAX_DEPTH} levels", where=node.where)
    return Marked({key: replace(node, error=error)}, node.where)


def _joined(first: Marked, second: Marked) -> Marked:
    """Both, key by key; a value that stands in both is the mistake that it is in one mapping."""
    if not isinstance(first.value, dict) or not isinstance(second.value, dict):
        error = UserError(f"duplicate key, first at {first.where}", where=second.where, fix="keep one")
        return replace(first, error=first.error or error)
    both = {key: _joined(node, second.value[key]) for key, node in first.value.items() if key in second.value}
    return replace(first, value={**first.value, **second.value, **both})


def _is_set(tree: Marked, dotted: str) -> bool:
    node: Marked | None = tree
    for key in dotted.split("."):
        node = node and node.child(key)
    return node is not None and node.value is not None


def _other_part(base: Marked, top: Marked, keys: Keys) -> bool:
    """Settings of one part mean nothing to another."""
    return ".".join(map(str, keys)) in axes() and base.value.keys() != top.value.keys()
