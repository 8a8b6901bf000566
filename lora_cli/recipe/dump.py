"""A recipe as text: what the loader reads, the other way round.

to_yaml         a recipe with every value written out; loads back into an equal one
explained       every value with the place that it came from
reference       a commented recipe with every key; `python -m lora_cli.recipe.dump > recipes/lora.yaml`
json_schema     what editors complete and check recipes with
"""

import json
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lora_cli.recipe.load import Loaded, settings_of
from lora_cli.recipe.read import INVISIBLE, resolve
from lora_cli.recipe.schema import Part, Recipe, WeightedSource, axes
from lora_cli.recipe.words import expected

PLAIN = re.compile(r"[A-Za-z0-9_./+][A-Za-z0-9_./+-]*")
WIDTH = 106

HEAD = """\
# Every key of a recipe with its meaning, what it takes, and its default. Only model.name and data.train are required.
#
# Numbers: 1e-4, 0.5 and 16 are numbers; only true and false are switches; yes, no, on and off are text.
# Text needs quotes where it has ": " or " #" in it, or starts with one of { [ & * ! | > % @.
# Paths are relative to the current directory, as in the shell.
# Variables: ${NAME} in a value is the environment variable NAME; without quotes around it, it may be a number.
#   $${ is a plain ${. Names that look like secrets (TOKEN, KEY, PASSWORD ...) are refused.
# Files: "extends: base.yaml" at the top starts from another recipe, whose path is relative to this file;
#   what stands here wins, mappings key by key, lists and parts whole.
# Command line: lora train recipe.yaml --set adapter.r=8 --set train.max_steps=100
# Parts of a method: "init: kaiming", or with settings "init: {kaiming: {setting: value}}"; see `lora methods`.
"""


def to_yaml(recipe: Recipe, *, only_set: bool = False) -> str:
    """The recipe with every value written out, keys in the order of the schema; or only those that were set.

    The two differ where a method has defaults of its own for keys that were not set.
    """
    return "\n".join(_block(_whole(recipe, only_set), "")) + "\n"


def explained(loaded: Loaded) -> list[tuple[str, str, str]]:
    """Dotted key, value as YAML, and where it came from (`default` when nowhere) for every value of a recipe."""
    leaves = _leaves(_whole(loaded.recipe), ())
    return [(key, text(value), loaded.origin(key) or "default") for key, value in leaves]


def text(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quoted(key)}: {text(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(text(item) for item in value) + "]"
    if isinstance(value, str):
        return _quoted(value.replace("${", "$${"))
    return {None: "null", True: "true", False: "false"}[value] if _is_word(value) else repr(value)


def reference() -> str:
    """A recipe with every key at its default, commented from the schema."""
    lines = [HEAD]
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        assert isinstance(section, type)
        assert issubclass(section, BaseModel)
        lines += _comment(" ".join((section.__doc__ or "").split()), "")
        lines += [f"# Example: {name}: {text(example)}" for example in field.examples or ()]
        lines += [f"{name}:" if section.model_fields else f"{name}: {{}}"]
        for key, inner in section.model_fields.items():
            lines += [*_comment(inner.description or "", "  "), *_takes(name, key, inner)]
            lines += [f"  {key}: {text(_written(_default(inner)))}"]
        lines.append("")
    return "\n".join(lines)


def json_schema() -> dict[str, Any]:
    """The recipe's JSON schema, the settings of every part included; imports the parts."""
    schema = Recipe.model_json_schema()
    for dotted, axis in axes().items():
        section, _, key = dotted.partition(".")
        _spell_out(_section(schema, section)["properties"][key], axis)
    _section(schema, "compare")["additionalProperties"] = _variant(schema)
    return _extensible({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})


def _whole(recipe: Recipe, only_set: bool = False) -> dict[str, Any]:
    """The recipe as sections; without variants it says nothing about them."""
    sections = _written(recipe, only_set)
    return sections if recipe.compare.variants else {k: v for k, v in sections.items() if k != "compare"}


def _written(value: Any, only_set: bool = False) -> Any:
    """A value as a recipe would say it, in the shortest form."""
    if isinstance(value, Part):
        return _short_part(value)
    if isinstance(value, tuple) and value and all(isinstance(item, Part) for item in value):
        short = [_short_part(item) for item in value]
        return short[0] if len(short) == 1 else short
    if isinstance(value, WeightedSource):
        told = value.model_dump(exclude_defaults=True)
        return told if len(told) > 1 else value.path
    if isinstance(value, BaseModel):
        keys = [key for key in type(value).model_fields if not only_set or key in value.model_fields_set]
        return {key: _written(getattr(value, key), only_set) for key in keys} | (value.model_extra or {})
    if isinstance(value, tuple) and value and all(isinstance(item, WeightedSource) for item in value):
        return _written(value[0]) if len(value) == 1 else [_written(item) for item in value]
    return value


def _short_part(part: Part) -> Any:
    p = part.settings.get("p")
    if part.name == "standard" and len(part.settings) == 1 and isinstance(p, float) and 0 <= p < 1:
        return p  # dropout: 0.05
    return {part.name: part.settings} if part.settings else part.name


def _block(mapping: dict[str, Any], indent: str) -> Iterator[str]:
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{_quoted(key)}:"
            yield from _block(value, indent + "  ")
        else:
            yield f"{indent}{_quoted(key)}: {text(value)}"


def _quoted(word: str) -> str:
    """Text as a scalar that is read back as the same text; quoted unless it is plainly a word or a path."""
    if PLAIN.fullmatch(word) and resolve(word) == word:
        return word
    escaped = json.dumps(word, ensure_ascii=False)
    return INVISIBLE.sub(lambda found: f"\\u{ord(found[0]):04x}", escaped)


def _is_word(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _leaves(value: Any, keys: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """The values of a mapping, and of mappings in lists, with their dotted keys."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*keys, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(inner, (*keys, str(index)))
    else:
        yield ".".join(keys), value


def _comment(words: str, indent: str) -> list[str]:
    return textwrap.wrap(words, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _takes(section: str, key: str, field: FieldInfo) -> list[str]:
    """What a key takes, and examples where the default shows little."""
    required = "; required" if field.is_required() else ""
    lines = _comment(f"Takes {expected(Recipe, (section, key))}{required}.", "  ")
    shown = (field.examples or [])[1 if field.is_required() else 0 :]
    return lines + [f"  # Example: {key}: {text(example)}" for example in shown]


def _default(field: FieldInfo) -> Any:
    return (field.examples or [""])[0] if field.is_required() else field.default


def _spell_out(schema: dict[str, Any], axis: str) -> None:
    """Put the settings of each part where the schema says only that there is a mapping."""
    for kind in schema["anyOf"]:
        if "items" in kind:
            _spell_out(kind["items"], axis)
        names = kind.pop("propertyNames", {}).get("enum", ())
        if names:
            settings = {name: settings_of(axis, name).model_json_schema() for name in names}
            kind["properties"] = {
                name: {"anyOf": [each, {"type": "null"}]} for name, each in settings.items()
            }
            kind["additionalProperties"] = False


def _variant(schema: dict[str, Any]) -> dict[str, Any]:
    """The sections, their keys dotted, and what is inside these, dotted further."""
    sections = {
        name: each for name, each in schema["properties"].items() if name not in ("output", "compare")
    }
    dotted = {
        f"{name}.{key}": {"$ref": f"{each['$ref']}/properties/{key}"}
        for name, each in sections.items()
        for key in _section(schema, name)["properties"]
    }
    return {
        "type": ["object", "null"],
        "properties": {**{name: {"$ref": each["$ref"]} for name, each in sections.items()}, **dotted},
        "patternProperties": {rf"^({'|'.join(sections)})\.\w+\..": {}},
        "additionalProperties": False,
    }


def _extensible(schema: dict[str, Any]) -> dict[str, Any]:
    """What a recipe must have, it may have from the one it extends."""
    extends = {
        "type": "string",
        "minLength": 1,
        "description": "Recipe to start from, relative to this file.",
    }
    sections = {name: {"$ref": section["$ref"]} for name, section in schema["properties"].items()}
    needed = {name: {"required": _section(schema, name).pop("required")} for name in schema["required"]}
    alone = {"required": schema.pop("required"), "properties": needed}
    properties = {"extends": extends, **sections}
    return {**schema, "properties": properties, "if": {"required": ["extends"]}, "else": alone}


def _section(schema: dict[str, Any], name: str) -> dict[str, Any]:
    return schema["$defs"][schema["properties"][name]["$ref"].rpartition("/")[2]]


if __name__ == "__main__":
    print(reference(), end="")
