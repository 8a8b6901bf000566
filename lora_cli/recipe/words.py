"""The JSON schema of a section, in words for people.

expected    what a key takes: "a whole number ≥ 1"
keys_of     which keys are known in a mapping
shown       a value as it is written in a recipe
dotted      the way to a value
mended      what to write instead of a value of the wrong kind
"""

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from pydantic import BaseModel

from lora_cli import parts
from lora_cli.errors import short
from lora_cli.recipe.read import resolve
from lora_cli.recipe.schema import Axis

Keys = tuple[str | int, ...]
"""The way from the top of the recipe down to a value."""
Schema = dict[str, Any]

BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
SWITCHES = {"yes": "true", "on": "true", "no": "false", "off": "false"}


@cache
def schema_of(section: type[BaseModel]) -> Schema:
    """The JSON schema of a section, made once."""
    return section.model_json_schema()


def keys_of(section: type[BaseModel], keys: Keys = ()) -> list[str]:
    """The keys that are known in the mapping at `keys`, in the order of the schema."""
    kinds = [kind for found in _at(section, keys) for kind in _kinds(found, section)]
    return list(dict.fromkeys(key for kind in kinds for key in kind.get("properties", ())))


def expected(section: type[BaseModel], keys: Keys) -> str:
    """What the value at `keys` may be."""
    words = dict.fromkeys(_words(found, section) for found in _at(section, keys))
    return ", or ".join(words) or "something else"


def shown(value: Any) -> str:
    """A value as it is written in a recipe, long ones cut."""
    if isinstance(value, tuple):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, dict):
        return "a mapping"
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    return f"'{short(value)}'" if isinstance(value, str) else short(str(value))


def dotted(*keys: str | int) -> str:
    """The way to a value: `adapter.r`; long keys cut."""
    return ".".join(short(str(key)) for key in keys)


def mended(value: Any, section: type[BaseModel], keys: Keys) -> str:
    """What was probably meant by a value of the wrong kind; empty when nothing comes to mind."""
    kinds = [kind for found in _at(section, keys) for kind in _kinds(found, section)]
    types = {kind.get("type") for kind in kinds}
    if value is None:
        return "leave the key out to have the default"
    if isinstance(value, str):
        return _mended_text(value, kinds, types)
    if isinstance(value, dict | tuple) and "string" in types:
        return "put quotes around it if it is text"
    if "array" in types and not isinstance(value, dict | tuple):
        return f"write [{short(str(value))}]"
    return ""


def _mended_text(value: str, kinds: list[Schema], types: set[Any]) -> str:
    known = [str(word) for kind in kinds for word in kind.get("enum", ())]
    items = [str(word) for kind in kinds for word in kind.get("items", {}).get("enum", ())]
    number = resolve(re.sub(r"(?<=\d)[_, ](?=\d)", "", value))
    if "boolean" in types and (word := SWITCHES.get(value.lower(), value.lower())) in ("true", "false"):
        return f"write {word}"
    if types & {"integer", "number"} and isinstance(number, int | float):
        return f"write {number}, without quotes"
    if close := parts.nearest(value, known):
        return f"did you mean '{close[0]}'?"
    if items and (close := parts.nearest(value, items)):
        return f"write [{close[0]}]"
    return "write something between the quotes, or leave the key out" if not value else ""


def _at(section: type[BaseModel], keys: Keys) -> list[Schema]:
    """Every schema that the value at `keys` may follow, as it stands at its key."""
    found = [schema_of(section)]
    for key in keys:
        inner = [_inside(kind, key) for each in found for kind in _kinds(each, section)]
        found = [each for each in inner if isinstance(each, dict)]
    return found


def _inside(kind: Schema, key: str | int) -> Any:
    if isinstance(key, str):
        return kind.get("properties", {}).get(key, kind.get("additionalProperties"))
    if "prefixItems" in kind:
        return kind["prefixItems"][min(key, len(kind["prefixItems"]) - 1)]
    return kind.get("items")


def _kinds(schema: Schema, section: type[BaseModel]) -> Iterator[Schema]:
    """The alternatives of a schema, references followed."""
    if "$ref" in schema:
        schema = schema_of(section)["$defs"][schema["$ref"].rpartition("/")[2]]
    if "anyOf" not in schema:
        yield schema
    for each in schema.get("anyOf", ()):
        yield from _kinds(each, section)


def _words(schema: Schema, section: type[BaseModel]) -> str:
    kinds = list(_kinds(schema, section))
    names_a_part = any("maxProperties" in kind for kind in kinds)
    words: list[str] = []
    for kind in kinds:
        if names_a_part and "propertyNames" in kind:
            words.append(Axis.expected)
        elif kind.get("type") == "array":
            words.append(_array(kind, section, ", or ".join(words)))
        elif not (names_a_part and "enum" in kind):  # all parts of an axis are too many to list
            words.append(_kind(kind, section))
    return ", or ".join(words)


def _kind(kind: Schema, section: type[BaseModel]) -> str:
    if "enum" in kind:
        return f"one of {', '.join(kind['enum'])}"
    return str(kind["const"]) if "const" in kind else NAMES[kind.get("type", "")](kind, section)


def _array(kind: Schema, section: type[BaseModel], so_far: str) -> str:
    if "prefixItems" in kind:
        items = kind["prefixItems"]
        return f"a list of {len(items)}, each {_words(items[0], section)}"
    item = _words(kind["items"], section)
    least = kind.get("minItems", 0)
    count = f" of at least {least}" if least > 1 else ""
    return "a list of these" if so_far == item else f"a list{count}, each {item}"


def _mapping(kind: Schema, section: type[BaseModel]) -> str:
    keys, inner = list(kind.get("properties", ())), kind.get("additionalProperties")
    if isinstance(inner, dict):
        return f"a mapping of text to {_words(inner, section)}"
    return f"a mapping with {', '.join(keys)}" if 0 < len(keys) < 5 else "a mapping of settings"


def _number(noun: str) -> Callable[[Schema, Any], str]:
    def words(kind: Schema, section: Any) -> str:
        bounds = [f"{sign} {kind[key]}" for key, sign in BOUNDS.items() if key in kind]
        return f"{noun} {' and '.join(bounds)}".rstrip()

    return words


NAMES: dict[str, Callable[[Schema, type[BaseModel]], str]] = {
    "string": lambda kind, section: "text",
    "boolean": lambda kind, section: "true or false",
    "null": lambda kind, section: "null",
    "integer": _number("a whole number"),
    "number": _number("a number"),
    "object": _mapping,
    "": lambda kind, section: "anything",
}
