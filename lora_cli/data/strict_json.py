"""JSON, stricter than Python's: no key twice, no NaN, no endless nesting, no halves of characters."""

import json
import math
import re
from typing import Any, NoReturn

from lora_cli.data.row import wrong

DEPTH_LIMIT = 64
"""Lists and objects inside one another."""


def skip(text: str, at: int) -> int:
    """The first position from `at` on that is not white space."""
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def whole(text: str, where: str, first_line: int) -> Any:
    """The JSON value that is all of a text."""
    value, end = decode(text, skip(text, 0), where, first_line)
    if end < len(text):
        raise wrong(f"not valid JSON: more text after the value, at column {end + 1}", where)
    return value


def decode(text: str, at: int, where: str, first_line: int) -> tuple[Any, int]:
    """The JSON value that starts at `at`, and where it ends; `first_line` is the number of the text's first line."""
    try:
        value, end = _DECODER.raw_decode(text, at)
    except RecursionError:
        raise wrong(f"nested deeper than {DEPTH_LIMIT} levels", where) from None
    except json.JSONDecodeError as error:
        line = f"{where.rpartition(':')[0]}:{first_line + error.lineno - 1}"
        raise wrong(f"not valid JSON: {error.msg} at column {error.colno}", line) from None
    except ValueError as error:
        raise wrong(f"not valid JSON: {error}", where) from None
    if text.count("[", at, end) + text.count("{", at, end) > DEPTH_LIMIT and _depth(value) > DEPTH_LIMIT:
        raise wrong(f"nested deeper than {DEPTH_LIMIT} levels", where)
    if _SURROGATE.search(text, at, end):
        _check_surrogates(value, where)
    return value, end


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return made


def _refuse(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is not a JSON number")


def _finite(literal: str) -> float:
    number = float(literal)
    if not math.isfinite(number):
        raise ValueError(f"the number {literal} is too large")
    return number


def _depth(value: Any) -> int:
    """Levels of lists and objects, found without recursion."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
    return depth


def _check_surrogates(value: Any, where: str) -> None:
    """Half of a surrogate pair is valid JSON, but no text: tokenizers crash on it."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise wrong(
            "holds one half of a surrogate pair (\\ud800 to \\udfff), which is not a character", where
        ) from None


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse, parse_float=_finite)
_SURROGATE = re.compile(r"\\u[dD][89abcdefABCDEF]")


def kind(value: Any) -> str:
    """What a person calls a JSON value."""
    names = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")
