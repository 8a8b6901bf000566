"""A YAML file as a tree of values that remember where they stand.

YAML's events are read one by one instead of with PyYAML's loader, so that limits hold before anything is built,
every duplicate key is seen, and values follow the YAML 1.2 core rules: `1e-4` is a number, `no` is text.
"""

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from lora_cli import parts
from lora_cli.errors import UserError

MAX_BYTES = 2**20
MAX_NODES = 10_000
MAX_DEPTH = 32
MAX_DIGITS = 300

INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
INVISIBLE = re.compile(
    r"[^\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]"
)
UNSTORABLE = re.compile(r"[\x00\ud800-\udfff]")

REFERENCE = re.compile(r"\$(?P<escaped>\$\{)|\$\{(?P<name>[^}]*)(?P<end>\}?)")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SECRET = re.compile(r"SECRET|PASSW|CREDENTIAL|(TOKEN|KEY|AUTH|PASSPHRASE)(_|$)", re.IGNORECASE)

FIXES = {
    "mapping values are not allowed": 'a value that contains ": " needs quotes around it',
    "could not find expected ':'": 'expected "key: value" on this line',
    "expected <block end>": "make the indentation of this line the same as of its neighbours",
    "expected ',' or": 'close the bracket, or put quotes around text with brackets in it, as in "${NAME}"',
    "unexpected end of stream": "close the quote",
    "cannot start any token": "put quotes around a value that starts with this character",
}


@dataclass(frozen=True, slots=True)
class Marked:
    """A value of a recipe and the place it came from."""

    value: Any
    """A scalar, a dict of str to Marked, or a list of Marked."""
    where: str
    """`file:line`; in front of it `${NAME} at ` where a variable was filled in."""
    error: UserError | None = None
    """Why the value cannot be used; it is reported together with everything else."""

    def child(self, key: str | int) -> "Marked | None":
        """The value under a key or at an index."""
        if isinstance(self.value, dict):
            return self.value.get(key)
        if isinstance(self.value, list) and isinstance(key, int) and key < len(self.value):
            return self.value[key]
        return None


def read_file(path: Path) -> Marked:
    """Read one YAML file.

    Raises:
        UserError: the file is missing, too big, not text, or not YAML.
    """
    return read_text(_decode(_content(path), str(path)), lambda line: f"{path}:{line}")


def read_text(text: str, place: Callable[[int], str]) -> Marked:
    """Read YAML text; `place` turns a line, counted from 1, into the words that say where it is."""
    _refuse_invisible(text, place)
    reader = _Reader(text, place)
    try:
        return reader.document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = str(error.problem or error.context)
        fix = next((fix for sign, fix in FIXES.items() if sign in problem), "")
        where = place(mark.line + 1) if mark else reader.here()
        raise UserError(f"not valid YAML: {problem}", where=where, fix=fix) from error
    except (ValueError, OverflowError) as error:
        # what PyYAML makes of "\UFFFFFFFF" and of version numbers of a thousand digits
        raise UserError("not valid YAML: a number is out of range", where=reader.here()) from error


def read_value(text: str, where: str) -> Marked:
    """Read a value from the command line: a list, a mapping or quoted text as in YAML, anything else as one scalar."""
    if text.lstrip()[:1] in ("[", "{", '"', "'"):
        return read_text(text, lambda line: where)
    _refuse_invisible(text, lambda line: where)
    return _scalar(text.strip(), where, plain=True)


def resolve(text: str) -> Any:
    """What a scalar without quotes means. A number too large to hold stays text, and is refused as such."""
    if text in WORDS:
        return WORDS[text]
    if len(text) <= MAX_DIGITS and INTEGER.fullmatch(text):
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text, base)
    if NUMBER.fullmatch(text) and not INTEGER.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    return text


def fill(text: str) -> tuple[str, list[str]]:
    """Replace each `${NAME}` by the environment's value and `$${` by `${`; also the names that were replaced.

    Raises:
        UserError: a variable is not set, or its name looks like a secret's.
    """
    names: list[str] = []

    def value(found: re.Match[str]) -> str:
        if found["escaped"]:
            return "${"
        name = found["name"]
        if not found["end"] or not VARIABLE.fullmatch(name):
            raise UserError("expected ${NAME}", fix="write $${ where ${ itself is meant")
        if SECRET.search(name):
            raise UserError(
                f"${{{name}}} looks like a secret, and a recipe is copied into the run folder",
                fix="libraries read tokens from the environment by themselves; leave it out",
            )
        if name not in os.environ:
            raise UserError(f"the environment variable {name} is not set", fix=f"export {name}=...")
        names.append(name)
        return os.environ[name]

    return REFERENCE.sub(value, text), names


def _scalar(text: str, where: str, *, plain: bool) -> Marked:
    """Text in quotes stays text; without quotes it is resolved, after variables are filled in."""
    try:
        text, names = fill(text)
    except UserError as error:
        return Marked(None, where, UserError(error.what, where=where, fix=error.fix))
    if unstorable := UNSTORABLE.search(text):
        return Marked(None, where, UserError(f"text must not contain {_named(unstorable)}", where=where))
    if names:
        where = f"${{{names[0]}}} at {where}"
    return Marked(resolve(text) if plain else text, where)


class _Reader:
    """Builds the tree out of the parser's events and counts as it goes."""

    def __init__(self, text: str, place: Callable[[int], str]) -> None:
        self.loader = yaml.SafeLoader(text)
        self.place = place
        self.anchors: dict[str, Marked] = {}
        self.count = 0

    def document(self) -> Marked:
        """The one document of the file; an empty file is a null."""
        self.event()
        if isinstance(self.event(), yaml.StreamEndEvent):
            return Marked(None, self.place(1))
        tree = self.node(self.event(), self.place(1), 1)
        self.event()
        after = self.event()
        if not isinstance(after, yaml.StreamEndEvent):
            raise UserError(
                "a second document", where=self.line(after), fix="remove everything from '---' on"
            )
        return tree

    def node(self, event: Any, where: str, depth: int) -> Marked:
        """The value that starts with `event`, its children included."""
        self.grow(depth, where)
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event, where, depth)
        if event.tag is not None:
            raise UserError("tags (!...) mean nothing in a recipe", where=self.line(event), fix="remove it")
        if isinstance(event, yaml.ScalarEvent):
            made = _scalar(event.value, where, plain=event.style is None)
        elif isinstance(event, yaml.MappingStartEvent):
            made = self.mapping(where, depth)
        else:
            made = self.sequence(where, depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = made
        return made

    def mapping(self, where: str, depth: int) -> Marked:
        entries: dict[str, Marked] = {}
        while not isinstance(event := self.event(), yaml.MappingEndEvent):
            key, here = self.key(event), self.line(event)
            value = self.node(self.event(), here, depth + 1)
            if key in entries:
                first = entries[key]
                error = UserError(f"duplicate key, first at {first.where}", where=here, fix="keep one")
                value = replace(first, error=first.error or error)
            entries[key] = value
        return Marked(entries, where)

    def sequence(self, where: str, depth: int) -> Marked:
        items: list[Marked] = []
        while not isinstance(event := self.event(), yaml.SequenceEndEvent):
            items.append(self.node(event, self.line(event), depth + 1))
        return Marked(items, where)

    def key(self, event: Any) -> str:
        """A key is text exactly as it stands there."""
        where = self.line(event)
        self.grow(0, where)
        plain_text = isinstance(event, yaml.ScalarEvent) and event.tag is None and event.anchor is None
        if not plain_text or not event.value or UNSTORABLE.search(event.value):
            raise UserError("expected a key that is plain text", where=where)
        if event.value == "<<" and event.style is None:
            raise UserError("merge keys (<<) are not read", where=where, fix="use 'extends: other.yaml'")
        return event.value

    def alias(self, event: Any, where: str, depth: int) -> Marked:
        """What the anchor named; unfinished ones are not known yet, which is why there are no cycles."""
        if event.anchor not in self.anchors:
            raise UserError(f"'*{event.anchor}' does not name anything complete above it", where=where)
        found = self.anchors[event.anchor]
        self.expand(found, where, depth)
        return replace(found, where=where)

    def expand(self, node: Marked, where: str, depth: int) -> None:
        """Count a value once more, because everyone who walks the tree will meet it once more."""
        self.grow(depth, where)
        children = node.value.values() if isinstance(node.value, dict) else node.value
        if isinstance(node.value, dict | list):
            for child in children:
                self.expand(child, where, depth + 1)

    def event(self) -> Any:
        return self.loader.get_event()

    def here(self) -> str:
        return self.place(self.loader.line + 1)

    def grow(self, depth: int, where: str) -> None:
        self.count += 1
        if depth > MAX_DEPTH:
            raise UserError(f"nested deeper than {MAX_DEPTH} levels", where=where)
        if self.count > MAX_NODES:
            raise UserError(f"more than {MAX_NODES} values, aliases counted each time", where=where)

    def line(self, event: Any) -> str:
        return self.place(event.start_mark.line + 1)


def _content(path: Path) -> bytes:
    """The bytes of a regular file of a sane size; a pipe or a device could be read for ever."""
    try:
        if not path.is_file():
            what = "is not a file" if path.exists() else "no such file"
            raise UserError(what, where=str(path), fix=_similar_file(path))
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot be read ({reason})", where=str(path)) from error
    if len(content) > MAX_BYTES:
        raise UserError(f"larger than {MAX_BYTES} bytes: not a recipe", where=str(path))
    return content


def _similar_file(path: Path) -> str:
    beside = [each.name for each in path.parent.glob("*.yaml")]
    close = parts.nearest(path.name, beside)
    return f"did you mean '{path.parent / close[0]}'?" if close else ""


def _decode(content: bytes, name: str) -> str:
    if content.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        what = "starts with a byte-order mark"
        raise UserError(what, where=f"{name}:1", fix="save it as UTF-8 without BOM")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        what = f"byte 0x{content[error.start]:02x} is not UTF-8"
        raise UserError(what, where=f"{name}:{line}", fix="save it as UTF-8") from error


def _refuse_invisible(text: str, place: Callable[[int], str]) -> None:
    """Characters that nobody sees and that YAML reads as a line break, as indentation, or not at all."""
    if found := INVISIBLE.search(text):
        where = place(text.count("\n", 0, found.start()) + 1)
        if found[0] == "\t":
            raise UserError(
                "a tab; YAML indents with spaces", where=where, fix='use spaces; in text write "\\t"'
            )
        raise UserError(f"the character {_named(found)} cannot be seen", where=where, fix="remove it")


def _named(found: re.Match[str]) -> str:
    return f"U+{ord(found[0]):04X}"
