"""Files and Hub ids -> rows, one at a time, every complaint with file and line.

Our own readers: `.jsonl` (an object a line), `.json` (a list of objects, or objects line by line), `.csv` (the first
line names the columns) and `.txt` (a document per paragraph: the lines up to a blank one, kept as they are; its column
is `text`). `.parquet` goes through pyarrow, ids on the Hub through datasets, streamed. A folder stands for the
data files in it, in the order of their names.
"""

import csv
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

from lora_cli import parts
from lora_cli.errors import ExitCode, UserError
from lora_cli.recipe.schema import WeightedSource

LINE_LIMIT = 64 * 2**20
"""Bytes of the longest line, and of the longest paragraph of a text file."""
JSON_LIMIT = 2**30
"""Bytes of the largest `.json` file: it is read whole, unlike the other kinds."""
DEPTH_LIMIT = 64
"""Lists and objects inside one another."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
NEWLINE = "\n"
HUB_ID = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?", re.ASCII)
SPLIT_NAMES = {"train": ("train",), "eval": ("validation", "valid", "val", "dev", "eval", "test")}
"""Splits on the Hub that can stand for ours, best first."""


@dataclass(frozen=True, slots=True)
class Row:
    """One record as it stands in its source."""

    values: dict[str, Any]
    where: str
    """`file:line` of its first line; rows of tables are counted from 1."""


def read_rows(sources: tuple[WeightedSource, ...], split: str) -> Iterator[tuple[int, Row]]:
    """All rows in order, each with the index of its source; `split` is `train` or `eval`, what the rows are for.

    Raises:
        UserError: something is missing, empty or broken; names file and line.
    """
    for index, source in enumerate(sources):
        for row in _rows(source, split):
            yield index, row


def fingerprint(sources: tuple[WeightedSource, ...], split: str) -> list[list[str]]:
    """Name and content hash of everything `read_rows` would read, in its order."""
    found: list[list[str]] = []
    for source in sources:
        files = _files(source, split)
        if files is None:
            found.append([source.path, _Hub(source, split).fingerprint()])
        else:
            found.extend([str(path), _sha256(path)] for path in files)
    return found


def snapshot(sources: tuple[WeightedSource, ...], split: str) -> list[tuple[str, int, int]]:
    """Name, size and time of change of every local file: tells cheaply whether one changed while it was read."""
    paths = [path for source in sources for path in _files(source, split) or ()]
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def _rows(source: WeightedSource, split: str) -> Iterator[Row]:
    files = _files(source, split)
    if files is None:
        yield from _not_empty(_Hub(source, split).rows(), source.path)
        return
    for path in files:
        yield from _not_empty(READERS[path.suffix.lower()](path), str(path))


def _not_empty(rows: Iterable[Row], name: str) -> Iterator[Row]:
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise wrong(
            "holds no rows", name, "an empty file is most likely a mistake; take it out of the recipe"
        )


# Which files


def _files(source: WeightedSource, split: str) -> list[Path] | None:
    """The local files of a source, or None for an id on the Hub."""
    path = Path(source.path).expanduser()
    if not path.exists():
        if _may_be_on_hub(source.path):
            return None
        near = parts.nearest(path.name, _names(path.parent))
        fix = f"did you mean '{path.with_name(near[0])}'?" if near else ""
        raise wrong("no such file or folder", source.path, fix)
    if source.split is not None:
        raise wrong(
            "'split' is for ids on the Hub", source.path, "leave it out, or name the file of that split"
        )
    if path.is_dir():
        return _in_folder(path, split)
    if not path.is_file():
        raise wrong("is neither a file nor a folder", source.path)
    if path.suffix.lower() not in READERS:
        raise wrong(f"unknown kind of file '{path.suffix}'", source.path, f"known: {', '.join(READERS)}")
    return [path]


def _may_be_on_hub(name: str) -> bool:
    """`owner/name` is a file's name as well: what lies in a folder that exists, or ends like a file, is a file."""
    match = HUB_ID.fullmatch(name)
    if match is None or Path(name).suffix.lower() in READERS or name.startswith("."):
        return False
    parent = Path(name).parent
    return parent == Path() or not parent.exists()


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def _in_folder(folder: Path, split: str) -> list[Path]:
    """The data files below a folder; files of two splits side by side would mix what must stay apart."""
    found = [
        path for path in sorted(folder.rglob("[!.]*")) if path.suffix.lower() in READERS and path.is_file()
    ]
    if not found:
        raise wrong("no data files in this folder", str(folder), f"known: {', '.join(READERS)}")
    other = {word for kind, words in SPLIT_NAMES.items() if kind != split for word in words}
    for path in found:
        for word in re.split(r"[^a-z]+", str(path.relative_to(folder)).lower()):
            if word in other and len(found) > 1:
                what = f"{path.name} looks like another split than '{split}'"
                raise wrong(what, str(folder), "name the files to use")
    return found


def _sha256(path: Path) -> str:
    with _reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Our own readers


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line, its end included; a byte-order mark at the start is passed over."""
    with _reading(path), path.open("rb") as file:
        for number in count(1):
            raw = file.readline(LINE_LIMIT + 1)
            if not raw:
                return
            if number == 1:
                raw = raw.removeprefix(BYTE_ORDER_MARK)
            yield number, _text(raw, f"{path}:{number}")


def _text(raw: bytes, where: str) -> str:
    if len(raw) > LINE_LIMIT:
        raise wrong(f"the line is longer than {LINE_LIMIT // 2**20} MB", where)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise wrong(
            f"not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1}", where, "save it as UTF-8"
        ) from None
    if "\0" in text:
        raise wrong(
            f"a NUL byte at character {text.index(chr(0)) + 1}", where, "the file is damaged or not a text"
        )
    return text


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        if text := line.rstrip():
            where = f"{path}:{number}"
            value, end = _decode(text, _skip(text, 0), where, number)
            if end < len(text):
                raise wrong(f"not valid JSON: more text after the value, at column {end + 1}", where)
            yield _record(value, where)


def _json(path: Path) -> Iterator[Row]:
    """A list of objects, read whole; a file that starts with an object is read line by line."""
    with _reading(path), path.open("rb") as file:
        start = file.read(4096).removeprefix(BYTE_ORDER_MARK).lstrip()
        if path.stat().st_size > JSON_LIMIT:
            raise wrong(
                f"larger than {JSON_LIMIT // 2**20} MB",
                str(path),
                "write one object a line into a .jsonl file",
            )
    if start[:1] == b"[":
        yield from _list(path)
    elif start:
        yield from _jsonl(path)


def _list(path: Path) -> Iterator[Row]:
    text = "".join(line for _, line in _lines(path))
    at, line, seen = _skip(text, text.index("[") + 1), 1, 0
    while text[at : at + 1] != "]":
        line, seen = line + text.count("\n", seen, at), at
        where = f"{path}:{line}"
        value, at = _decode(text, at, where, 1)
        yield _record(value, where)
        at = _next_item(text, _skip(text, at), path)
    if text[at + 1 :].strip():
        raise wrong("not valid JSON: more text after the list", f"{path}:{1 + text.count(NEWLINE, 0, at)}")


def _next_item(text: str, at: int, path: Path) -> int:
    """From behind one item of a list to the start of the next, or to the closing bracket."""
    if text[at : at + 1] == "]":
        return at
    start = _skip(text, at + 1)
    if text[at : at + 1] != "," or text[start : start + 1] == "]":
        raise wrong(
            "not valid JSON: expected ',' and an object, or ']'", f"{path}:{1 + text.count(NEWLINE, 0, at)}"
        )
    return start


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(LINE_LIMIT)  # its own limit of 128 KB is below many a document
    reader = csv.reader((text for _, text in _lines(path)), strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise wrong(f"not valid CSV: {error}", f"{path}:{reader.line_num}") from None
        if fields is None:
            return
        if not fields:
            continue
        if header is None:
            header = _header(fields, where)
        elif len(fields) != len(header):
            raise wrong(f"{len(fields)} fields, but the first line names {len(header)} columns", where)
        else:
            yield Row(dict(zip(header, fields, strict=True)), where)


def _header(fields: list[str], where: str) -> list[str]:
    for name in fields:
        if not name.strip() or fields.count(name) > 1:
            raise wrong(f"the column name {name!r} is {'given twice' if name.strip() else 'empty'}", where)
    return fields


def _txt(path: Path) -> Iterator[Row]:
    paragraph: list[str] = []
    first = size = 0
    for number, text in _lines(path):
        if not text.strip():
            if paragraph:
                yield Row({"text": "\n".join(paragraph)}, f"{path}:{first}")
            paragraph, size = [], 0
            continue
        if not paragraph:
            first = number
        paragraph.append(text.rstrip("\r\n"))
        size += len(text)
        if size > LINE_LIMIT:
            raise wrong(f"the paragraph is longer than {LINE_LIMIT // 2**20} MB", f"{path}:{first}")
    if paragraph:
        yield Row({"text": "\n".join(paragraph)}, f"{path}:{first}")


# JSON, stricter than Python's


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _decode(text: str, at: int, where: str, first_line: int) -> tuple[Any, int]:
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


def _record(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise wrong(f'expected an object like {{"text": ...}}, got {_kind(value)}', where)
    return Row(value, where)


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


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


# Tables


def _parquet(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with _reading(path), ParquetFile(path) as table:
            numbers = count(1)
            for batch in table.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    yield Row(_clean(values), f"{path}:{next(numbers)}")
    except ArrowException as error:
        raise wrong(f"not a readable parquet file: {error}", str(path)) from error


class _Hub:
    """A dataset on the Hub, `owner/name` or `owner/name:config`, read row by row without storing it."""

    def __init__(self, source: WeightedSource, split: str) -> None:
        match = HUB_ID.fullmatch(source.path)
        self.path, self.split = source.path, source.split
        self.name, self.config = (match["name"], match["config"]) if match else (source.path, None)
        self.split_names = SPLIT_NAMES[split]

    def fingerprint(self) -> str:
        """What identifies the published version: its commit and files, not their bytes."""
        from datasets import load_dataset_builder

        with self._reading():
            builder = load_dataset_builder(self.name, self.config)
            return f"{builder.config_id} {builder.hash} {self._split()}"

    def rows(self) -> Iterator[Row]:
        from datasets import load_dataset

        with self._reading():
            table = load_dataset(self.name, self.config, split=self._split(), streaming=True)
            for number, values in enumerate(table, 1):
                yield Row(_clean(values), f"{self.path}:{number}")

    def _split(self) -> str:
        from datasets import get_dataset_split_names

        known = get_dataset_split_names(self.name, self.config)
        wanted = self.split_names if self.split is None else (self.split,)
        found = [name for name in wanted if name in known]
        if not found:
            fix = f"set split to one of: {', '.join(known)}"
            raise wrong(f"no split named {' or '.join(wanted)}", self.path, fix)
        return found[0]

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # the network and every file format can fail here, each in its own way
            raise wrong(
                f"no such file or folder, and not readable from the Hub: {str(error).splitlines()[0]}",
                self.path,
                "check the name; a gated dataset needs `hf auth login`",
            ) from error


def _clean(values: dict[str, Any]) -> dict[str, Any]:
    """Columns as plain Python. Tables fill in what other rows have: missing keys inside a column come as None."""
    return {name: _without_none(value) for name, value in values.items()}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value


# Errors


def wrong(what: str, where: str, fix: str = "") -> UserError:
    """An error in the data."""
    return UserError(what, where=where, fix=fix, code=ExitCode.DATA)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise wrong(f"cannot be read ({error.strerror or error})", str(path)) from error


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".txt": _txt,
    ".parquet": _parquet,
}
