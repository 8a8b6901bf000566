"""What pydantic finds wrong, in words for people: where it stands, what was expected, what to do."""

import difflib
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lora_cli.errors import UserError
from lora_cli.recipe import peers
from lora_cli.recipe.schema import Recipe
from lora_cli.recipe.words import Keys, dotted, expected, keys_of, mended, shown

QUOTED = re.compile(r"'([\w.]+)'")


def complaints(
    section: type[BaseModel],
    data: Any,
    where: Callable[[Keys], str],
    top: Keys = (),
    broken: Collection[Keys] = (),
) -> Iterator[UserError]:
    """Everything that is wrong with `data`, one error for each mistake, found as they are asked for.

    Args:
        section: the model that `data` should fit.
        data: mappings, tuples and scalars.
        where: the place of a key, or of the nearest one above it that was written.
        top: the way from the top of the recipe to `data`.
        broken: keys known to be wrong; nothing is said about them.
    """
    return _Check(section, data, where, top, wrong={_removable(keys) for keys in broken}).found()


@dataclass
class _Check:
    """pydantic looks for contradictions only among keys that are right by themselves, so wrong keys are left out
    and the rest is checked again, until nothing new turns up.
    """

    section: type[BaseModel]
    data: Any
    where: Callable[[Keys], str]
    top: Keys
    wrong: set[Keys]
    implied: set[Keys] = field(default_factory=set[Keys])
    """Keys that an unknown key stands for; they are not called missing."""

    def found(self) -> Iterator[UserError]:
        """Check until nothing new turns up."""
        before = -1
        while len(self.wrong) > before and (details := self.details()):
            before = len(self.wrong)
            for keys, detail in self.one_each(sorted(details, key=lambda each: each["type"] == "missing")):
                yield from self.told(keys, detail)

    def details(self) -> list[ErrorDetails]:
        """What pydantic says about everything but the keys that are known to be wrong."""
        try:
            self.section.model_validate(_without(self.data, self.wrong))
        except ValidationError as refused:
            return refused.errors(include_url=False, include_input=False)
        return []

    def one_each(self, details: list[ErrorDetails]) -> Iterator[tuple[Keys, ErrorDetails]]:
        """One detail for each place; of the branches of a union, the one that got furthest speaks."""
        placed = [(_written(detail, self.data), detail) for detail in details]
        above = {each for keys, _ in placed for each in _above(keys)}
        told: set[Keys] = set()
        for keys, detail in placed:
            shallow = keys in above and detail["type"] not in ("value_error", "missing")
            if keys not in told and not shallow and self.wrong.isdisjoint([*_above(keys), keys]):
                told.add(keys)
                yield keys, detail

    def told(self, keys: Keys, detail: ErrorDetails) -> Iterator[UserError]:
        """One detail in our words."""
        match detail["type"]:
            case "value_error":
                yield from self.contradictions(
                    keys, str(detail["ctx"]["error"]) if "ctx" in detail else detail["msg"]
                )
            case "extra_forbidden":
                yield self.unknown(keys)
            case "missing" if isinstance(detail["loc"][-1], str):
                if not any(each[: len(keys)] == keys for each in self.implied):
                    fix = f"expected {expected(self.section, keys)}"
                    yield self.error(keys, f"missing key '{self.name(keys)}'", fix)
            case _:
                value = _value(self.data, keys)
                what = f"{self.name(keys)}: expected {expected(self.section, keys)}, got {shown(value)}"
                yield self.error(keys, what, mended(value, self.section, keys))

    def unknown(self, keys: Keys) -> UserError:
        word, here = str(keys[-1]), keys_of(self.section, keys[:-1])
        sections = keys_of(Recipe) if self.section is Recipe else []
        homes = {each: keys_of(Recipe, (each,)) for each in sections}
        fix, meant = _advice(word, here, homes)
        self.implied.add((*keys[:-1], meant) if meant in here else tuple(meant.split(".")))
        return self.error(keys, f"unknown key '{self.name(keys)}'", fix)

    def contradictions(self, keys: Keys, message: str) -> Iterator[UserError]:
        """Messages of our own, one a line, `what; fix`, that name keys in quotes, dotted from `keys`."""
        is_section = bool(keys_of(self.section, keys))
        for line in message.split("\n"):
            named = [(*keys, *word.split(".")) for word in QUOTED.findall(line)] if is_section else []
            if any(_removable(each) in self.wrong for each in named):
                continue
            written = [each for each in named if _has(self.data, each)] or [keys]
            what, _, fix = line.rpartition("; ") if "; " in line else (line, "", "")
            yield self.error(written[0], f"{self.name(keys)}: {what}" if keys else what, fix)
            self.wrong |= {_removable(each) for each in written}

    def error(self, keys: Keys, what: str, fix: str) -> UserError:
        """From now on the key is known to be wrong."""
        self.wrong.add(_removable(keys))
        return UserError(what, where=self.where((*self.top, *keys)), fix=fix)

    def name(self, keys: Keys) -> str:
        return dotted(*self.top, *keys)


def _advice(word: str, here: list[str], homes: dict[str, list[str]]) -> tuple[str, str]:
    """What to do about an unknown key, and the key that was meant: a word out of `here`, or dotted from the top.

    Args:
        word: the unknown key.
        here: keys known in the same mapping.
        homes: keys of every section of the recipe.
    """
    at_home = [section for section, keys in homes.items() if word in keys]
    if at_home:
        return f"'{word}' belongs under {' or '.join(map(repr, at_home))}", f"{at_home[0]}.{word}"
    if word in homes:
        return f"'{word}' is a section: it belongs at the left margin", word
    if homes and (translated := peers.advice(word.lower())):
        return translated, peers.RENAMED.get(word.lower(), "")
    elsewhere = {key: f"{section}.{key}" for section, keys in homes.items() for key in keys}
    foreign = {*peers.RENAMED, *peers.EXPLAINED} if homes else set[str]()
    for known, closeness in ((here, 0.8), ([*elsewhere, *foreign], 0.8), (here, 0.5), (elsewhere, 0.7)):
        close = difflib.get_close_matches(word, known, n=1, cutoff=closeness)
        if close:
            return _did_you_mean(close[0], here, elsewhere)
    return (f"known: {', '.join(here)}" if here else "nothing can be set here"), ""


def _did_you_mean(close: str, here: list[str], elsewhere: dict[str, str]) -> tuple[str, str]:
    if close in here:
        return f"did you mean '{close}'?", close
    if close in elsewhere:
        return f"did you mean '{elsewhere[close]}'?", elsewhere[close]
    return f"if '{close}' is meant: {peers.advice(close)}", peers.RENAMED.get(close, "")


def _written(detail: ErrorDetails, data: Any) -> Keys:
    """The way as it was written, without the names that pydantic adds for the branches of a union."""
    keys: list[str | int] = []
    for step in detail["loc"]:
        if _has(data, (step,)):
            keys.append(step)
            data = _value(data, (step,))
    if detail["type"] == "missing" and isinstance(detail["loc"][-1], str):
        keys.append(detail["loc"][-1])
    return tuple(keys)


def _has(data: Any, keys: Keys) -> bool:
    for key in keys:
        inside = isinstance(data, tuple) and isinstance(key, int) and key < len(data)
        if not inside and not (isinstance(data, dict) and key in data):
            return False
        data = _value(data, (key,))
    return True


def _value(data: Any, keys: Keys) -> Any:
    for key in keys:
        data = data[key]
    return data


def _above(keys: Keys) -> list[Keys]:
    """The ways to everything that the value at `keys` is in, from the top down."""
    return [keys[:cut] for cut in range(len(keys))]


def _removable(keys: Keys) -> Keys:
    """The key itself, or the list that it is in: taking an item out of a list would shift the others."""
    return tuple(takewhile(lambda key: isinstance(key, str), keys))


def _without(data: Any, wrong: Collection[Keys], here: Keys = ()) -> Any:
    if not isinstance(data, dict):
        return data
    return {
        key: _without(value, wrong, (*here, key)) for key, value in data.items() if (*here, key) not in wrong
    }
