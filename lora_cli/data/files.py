"""jsonl, json, csv and txt files -> rows, by our own readers, so that every complaint has file and line."""

import csv
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from lora_cli.data import strict_json
from lora_cli.data.row import Row, reading, wrong

LINE_LIMIT = 64 * 2**20
"""Bytes of the longest line, and of the longest paragraph of a text file."""
JSON_LIMIT = 2**30
"""Bytes of the largest `.json` file: it is read whole, unlike the other kinds."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
NEWLINE = "\n"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line, its end included; a byte-order mark at the start is passed over."""
    with reading(path), path.open("rb") as file:
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


def read_jsonl(path: Path) -> Iterator[Row]:
    """An object a line; blank lines are passed over."""
    for number, line in _lines(path):
        if text := line.rstrip():
            where = f"{path}:{number}"
            yield _record(strict_json.whole(text, where, number), where)


def read_json(path: Path) -> Iterator[Row]:
    """A list of objects, read whole; a file that starts with an object is read line by line."""
    with reading(path), path.open("rb") as file:
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
        yield from read_jsonl(path)


def _list(path: Path) -> Iterator[Row]:
    text = "".join(line for _, line in _lines(path))
    at, line, seen = strict_json.skip(text, text.index("[") + 1), 1, 0
    while text[at : at + 1] != "]":
        line, seen = line + text.count("\n", seen, at), at
        where = f"{path}:{line}"
        value, at = strict_json.decode(text, at, where, 1)
        yield _record(value, where)
        at = _next_item(text, strict_json.skip(text, at), path)
    if text[at + 1 :].strip():
        raise wrong("not valid JSON: more text after the list", f"{path}:{1 + text.count(NEWLINE, 0, at)}")


def _next_item(text: str, at: int, path: Path) -> int:
    """From behind one item of a list to the start of the next, or to the closing bracket."""
    if text[at : at + 1] == "]":
        return at
    start = strict_json.skip(text, at + 1)
    if text[at : at + 1] != "," or text[start : start + 1] == "]":
        raise wrong(
            "not valid JSON: expected ',' and an object, or ']'", f"{path}:{1 + text.count(NEWLINE, 0, at)}"
        )
    return start


def read_csv(path: Path) -> Iterator[Row]:
    """Comma-separated; the first line names the columns, every value is a text."""
    csv.field_size_limit(LINE_LIMIT)  # its own limit of 128 KB is below many a document
    reader = csv.reader((text for _, text in _lines(path)), strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            fields = next(reader, None)
        except csv.Error as error:  # of an open quote the end of the file is seen, far below
            raise wrong(f"not valid CSV: {error}, in line {reader.line_num}", where) from None
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


def read_txt(path: Path) -> Iterator[Row]:
    """A document per paragraph, with its line ends as they are and the column name `text`."""
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
        paragraph.append(text.removesuffix("\n").removesuffix("\r"))
        if "\r" in paragraph[-1]:
            raise wrong("a carriage return within the line", f"{path}:{number}", "save it with line feeds")
        size += len(text)
        if size > LINE_LIMIT:
            raise wrong(f"the paragraph is longer than {LINE_LIMIT // 2**20} MB", f"{path}:{first}")
    if paragraph:
        yield Row({"text": "\n".join(paragraph)}, f"{path}:{first}")


def _record(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise wrong(f'expected an object like {{"text": ...}}, got {strict_json.kind(value)}', where)
    return Row(value, where)
