"""Every fault in every kind of file is named by file and line; every row that is learned is learned whole, or named."""

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.data import files, load
from lora_cli.data.source import READERS, read_rows
from lora_cli.errors import ExitCode, UserError
from lora_cli.recipe.load import load as load_recipe
from lora_cli.recipe.schema import DataRecipe, WeightedSource
from lora_cli.run.check import check
from lora_cli.screen import Screen
from tests import on_disk, tiny

KINDS = (".jsonl", ".json", ".csv", ".txt")
FIRST_LINE = {".jsonl": 1, ".json": 2, ".csv": 2, ".txt": 1}
STRIDE = {".jsonl": 1, ".json": 1, ".csv": 1, ".txt": 2}


def rows_of(path: Path) -> list[tuple[dict[str, Any], str]]:
    return [(row.values, row.where) for _, row in read_rows((WeightedSource(path=str(path)),), "train")]


def line_of(kind: str, row: int) -> int:
    """The line on which a row, counted from 0, stands in a file that `content` made."""
    return FIRST_LINE[kind] + STRIDE[kind] * row


def record(kind: str, text: bytes) -> bytes:
    """A row with this text, which needs no escaping."""
    return {".csv": b'"' + text + b'"', ".txt": text}.get(kind, b'{"text": "' + text + b'"}')


def content(kind: str, records: list[bytes], end: bytes = b"\n") -> bytes:
    before, between, after = {
        ".jsonl": (b"", end, end),
        ".json": (b"[" + end, b"," + end, end + b"]" + end),
        ".csv": (b"text" + end, end, end),
        ".txt": (b"", end * 2, end),
    }[kind]
    return before + between.join(records) + after


def some_texts() -> list[bytes]:
    """Different ones in each session."""
    return [f"row {i}: {random.random()} ünïcödé 文".encode() for i in range(random.randint(6, 20))]


IN_TEXT = {
    "a byte that is no UTF-8": (b"\xff", "not UTF-8: byte 0xff"),
    "Latin-1": ("café".encode("latin-1"), "not UTF-8"),
    "half a character": (b"\xe2\x82", "not UTF-8"),
    "a surrogate in UTF-8": (b"\xed\xa0\x80", "not UTF-8"),
    "a NUL": (b"\0", "NUL"),
    "too much": (b"x" * 3000, "longer than"),
}
CELLS = {  # in place of a whole record of JSON, alone or in a list
    "NaN": (b'{"text": NaN}', "NaN is not a JSON number"),
    "Infinity": (b'{"text": Infinity}', "Infinity is not"),
    "minus infinity": (b'{"text": [-Infinity]}', "-Infinity is not"),
    "a number beyond all floats": (b'{"text": 1e999}', "too large"),
    "a key twice": (b'{"text": "a", "text": "b"}', "given twice"),
    "a key twice, deep": (b'{"text": [{"a": 1, "a": 2}]}', "'a' is given twice"),
    "deep nesting": (b'{"text": ' + b"[" * 80 + b"]" * 80 + b"}", "nested deeper"),
    "endless nesting": (b'{"text": ' + b'{"a":' * 50_000, "nested deeper"),
    "half a character, escaped": (b'{"text": "\\udc00"}', "surrogate"),
    "a comma too many": (b'{"text": "a",}', "not valid JSON"),
    "no comma": (b'{"text": "a" "b": 1}', "not valid JSON"),
    "single quotes": (b"{'text': 'a'}", "not valid JSON"),
    "no quotes": (b'{text: "a"}', "not valid JSON"),
    "a comment": (b'{"text": "a" /* b */}', "not valid JSON"),
    "an open text": (b'{"text": "a', "not valid JSON"),
    "a tab in a text": (b'{"text": "a\tb"}', "not valid JSON"),
    "a carriage return in a text": (b'{"text": "a\rb"}', "not valid JSON"),
    "a number with a zero in front": (b'{"text": 01}', "not valid JSON"),
    "a hexadecimal number": (b'{"text": 0x1F}', "not valid JSON"),
    "a list": (b'["a"]', "got a list"),
    "a text": (b'"a"', "got a text"),
    "a number": (b"3", "got a number"),
    "true": (b"true", "got true or false"),
    "null": (b"null", "got null"),
    "None": (b"None", "not valid JSON"),
}
FIELDS = {
    "a field too many": (b'"a","b"', "2 fields"),
    "a quote in the middle": (b'"a"b"', "not valid CSV"),
    "an open quote": (b'"a', "not valid CSV"),
}
FAULTS = [
    *((kind, name, None, *fault) for kind in KINDS for name, fault in IN_TEXT.items()),
    *((kind, name, fault[0], *fault) for kind in (".jsonl", ".json") for name, fault in CELLS.items()),
    *((".csv", name, fault[0], *fault) for name, fault in FIELDS.items()),
    (".txt", "a lone carriage return", None, b"\r", "carriage return"),
]


@pytest.mark.parametrize(
    ("kind", "name", "whole", "text", "reason"), FAULTS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_a_fault_is_named_by_its_line_and_the_rows_before_it_are_as_they_stand(
    tmp_path, monkeypatch, kind, name, whole, text, reason
):
    monkeypatch.setattr(files, "LINE_LIMIT", 300_000 if "endless" in name else 1500)
    texts = some_texts()
    broken = random.randrange(len(texts))
    records = [record(kind, each) for each in texts]
    records[broken] = whole or record(kind, texts[broken] + text + b"behind it")
    path = tmp_path / f"rows{kind}"
    path.write_bytes(content(kind, records))
    found = []
    with pytest.raises(UserError) as caught:
        found.extend(row for _, row in read_rows((WeightedSource(path=str(path)),), "train"))
    assert caught.value.where == f"{path}:{line_of(kind, broken)}"
    assert reason in caught.value.what
    assert caught.value.code == ExitCode.DATA
    if kind in (
        ".jsonl",
        ".csv",
    ):  # the others are known to be whole before the first row of theirs comes out
        found = rows_until(path)
        assert [row.values["text"].encode() for row in found] == texts[:broken]


def rows_until(path: Path) -> list[Any]:
    """The rows that come before the error."""
    found = []
    try:
        for _, row in read_rows((WeightedSource(path=str(path)),), "train"):
            found.append(row)
    except UserError:
        return found
    raise AssertionError("no error")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", ["whole", "without its line end"])
def test_line_ends_and_byte_order_marks_change_no_row(tmp_path, kind, end, mark, last):
    texts = some_texts()
    raw = content(kind, [record(kind, text) for text in texts], end)
    path = tmp_path / f"rows{kind}"
    path.write_bytes(mark + (raw if last == "whole" else raw.rstrip()))
    expected = [({"text": text.decode()}, f"{path}:{line_of(kind, i)}") for i, text in enumerate(texts)]
    assert rows_of(path) == expected


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("raw", [b"", b"\n", b" \r\n\t", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_a_file_with_nothing_in_it_is_an_error_of_the_file(tmp_path, kind, raw):
    path = tmp_path / f"rows{kind}"
    path.write_bytes(raw)
    with pytest.raises(UserError) as caught:
        rows_of(path)
    assert caught.value.where.startswith(str(path))
    assert caught.value.code == ExitCode.DATA


def test_an_archive_under_the_name_of_a_text_is_refused(tmp_path):
    import gzip

    for kind in KINDS:
        path = tmp_path / f"rows{kind}"
        path.write_bytes(gzip.compress(b" " * 10**7))
        with pytest.raises(UserError) as caught:
            rows_of(path)
        assert caught.value.where == f"{path}:1"


def mutated(raw: bytes) -> bytes:
    """A few bytes changed, taken out, put in, or the end cut off."""
    content = bytearray(raw)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(content) + 1)
        match random.randrange(4):
            case 0:
                content[at : at + 1] = bytes([random.randrange(256)])
            case 1:
                del content[at : at + random.randint(1, 9)]
            case 2:
                content[at:at] = random.choice(
                    [b"\0", b"\r", b'"', b"{", b"[", b",", b"\xff", b"\n", b"NaN", b"\\u"]
                )
            case _:
                del content[at:]
    return bytes(content)


@pytest.mark.parametrize("kind", READERS)
def test_whatever_stands_in_a_file_is_rows_or_an_error_with_its_place(tmp_path, kind):
    path = tmp_path / f"rows{kind}"
    texts = [f"row {i}" for i in range(5)]
    if kind == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": [0.5] * 5}), path)
    else:
        path.write_bytes(content(kind, [record(kind, text.encode()) for text in texts]))
    raw = path.read_bytes()
    for _ in range(300):
        path.write_bytes(mutated(raw))
        error = error_of(path)
        assert error is None or error.where.startswith(str(path)), error
        assert error is None or error.code == ExitCode.DATA, error


def error_of(path: Path) -> UserError | None:
    try:
        rows_of(path)
    except UserError as error:
        return error
    return None


# Types


def loaded(folder: Path, path: Path, **recipe: Any) -> load.Datasets:
    data = DataRecipe.model_validate({"train": str(path), "chat_template": "none", **recipe})
    return load.load(data, tiny.tokenizer(), cache=folder / "cache", seed=0)


WRONG = {
    "null": None,
    "a list": ["a"],
    "an object": {"a": "b"},
    "nan": float("nan"),
    "inf": float("inf"),
    "bytes": b"a",
}


@pytest.mark.parametrize("column", ["prompt", "completion"])
@pytest.mark.parametrize("value", WRONG)
def test_a_column_of_the_wrong_type_is_named_by_its_row(tmp_path, column, value):
    rows = [{"prompt": "a", "completion": "b"} for _ in range(random.randint(3, 9))]
    broken = random.randrange(len(rows))
    wrong = WRONG[value]
    paths = [tmp_path / "rows.parquet"]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    # A column of a table has one type: what is wrong is wrong from the first row on, but for null and nan.
    everywhere = value not in ("null", "nan", "inf")
    columns[column] = [wrong] * len(rows) if everywhere else [*columns[column]]
    if value == "null":
        columns[column][broken] = None
    elif not everywhere:
        columns[column] = [0.5] * broken + [wrong] + [0.5] * (len(rows) - broken - 1)
    pyarrow.parquet.write_table(pyarrow.table(columns), paths[0])
    if value in ("null", "a list", "an object"):
        rows[broken] = {**rows[broken], column: wrong}
        paths.append(on_disk.rows(tmp_path / "rows.jsonl", *rows))
    for path in paths:
        with pytest.raises(UserError) as caught:
            loaded(tmp_path, path)
        row = 0 if everywhere and path.suffix == ".parquet" else broken
        assert caught.value.where == f"{path}:{row + 1}", path
        assert f"'{column}'" in caught.value.what


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ('[{"role": "user", "role": "assistant", "content": "a"}]', "'role' is given twice"),
        ('[{"role": "user", "content": NaN}]', "NaN"),
        ('[{"role": "user", "content": "a"}', "not valid JSON"),
        ('[{"role": "user", "content": "a"}] and more', "more text"),
        ("[" * 70 + "]" * 70, "nested deeper"),
        ("hello", "is a text, not a list"),
    ],
)
def test_json_in_a_column_is_as_strict_as_json_in_a_file(tmp_path, cell, reason):
    path = on_disk.rows(tmp_path / "rows.jsonl", {"messages": "[]"}, {"messages": cell})
    path.write_text(path.read_text().splitlines()[1] + "\n")
    with pytest.raises(UserError) as caught:
        loaded(tmp_path, path, chat_template="auto")
    assert caught.value.where == f"{path}:1"
    assert reason in caught.value.what


def test_a_text_in_a_table_that_is_not_utf_8_is_named_by_its_row(tmp_path):
    count = random.randint(3, 2000)
    broken = random.randrange(count)
    raw = [b"\xff" if i == broken else b"fine" for i in range(count)]
    offsets = [0]
    for each in raw:
        offsets.append(offsets[-1] + len(each))
    buffers = [None, pyarrow.array(offsets, pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"".join(raw))]
    texts = pyarrow.Array.from_buffers(pyarrow.string(), count, buffers)
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    with pytest.raises(UserError) as caught:
        rows_of(path)
    assert caught.value.where == f"{path}:{broken + 1}"


def test_a_table_with_a_column_twice_is_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(UserError, match="'text' is there twice"):
        rows_of(path)


# A file that changes


def appended(path: Path) -> None:
    path.write_text(path.read_text() * 2)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 + 1)


def replaced(path: Path) -> None:
    path.with_suffix(".new").write_text('{"prompt": "x", "completion": "y"}\n')
    path.with_suffix(".new").replace(path)


def removed(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("change", [appended, cut, replaced, removed])
def test_a_file_that_changes_while_it_is_read_is_no_data(tmp_path, monkeypatch, change):
    path = on_disk.rows(
        tmp_path / "rows.jsonl", *({"prompt": "a" * 50, "completion": str(i)} for i in range(9_000))
    )
    examples, seen = load.Format.examples, []

    def watched(form, row):
        seen.append(row)
        if len(seen) == 1000:
            change(path)
        return examples(form, row)

    monkeypatch.setattr(load.Format, "examples", watched)
    with pytest.raises(UserError, match=r"changed while it was read|no such file") as caught:
        loaded(tmp_path, path)
    assert caught.value.code == ExitCode.DATA
    assert list((tmp_path / "cache").glob("*")) == []


# What is learned


@settings(max_examples=40, deadline=None)
@given(
    answers=st.lists(
        st.text(st.characters(codec="ascii", categories=("L", "N", "P")), min_size=0, max_size=30),
        min_size=1,
        max_size=12,
    ),
    max_length=st.integers(8, 60),
    overflow=st.sampled_from(["drop", "truncate"]),
    chat=st.sampled_from(["auto", "none"]),
)
def test_every_row_keeps_its_answer_and_its_end_or_is_named(
    tmp_path_factory, answers, max_length, overflow, chat
):
    folder, tokenizer = tmp_path_factory.mktemp("rows"), tiny.tokenizer()
    path = on_disk.rows(
        folder / "rows.jsonl", *({"prompt": f"{i}?", "completion": each} for i, each in enumerate(answers))
    )
    try:
        train = loaded(folder, path, max_length=max_length, overflow=overflow, chat_template=chat).train
    except UserError as error:
        if "no row is left to learn from" not in error.what:
            raise
        return
    named = {each["where"] for each in train.rejected(100)}
    for index in range(len(train)):
        example = train[index]
        ids = [i for i, trained in zip(example.input_ids, example.trained, strict=True) if trained]
        answer = answers[int(example.where.rpartition(":")[2]) - 1]
        whole = tokenizer.decode(ids) == answer + tokenizer.eos_token
        assert whole == (example.where not in named), (example, answer)
        assert example.input_ids.count(tokenizer.bos_token_id) <= 1
        assert example.input_ids.count(tokenizer.pad_token_id) == 0
    kept = {train.where(index) for index in range(len(train))}
    assert kept | named == {f"{path}:{i + 1}" for i in range(len(answers))}


def test_check_names_the_rows_that_are_not_learned_as_they_stand(tmp_path, tiny_folder, capsys):
    answers = ["yes", "a long answer " * 9, "no", " ", "another long answer " * 9]
    path = on_disk.rows(tmp_path / "rows.jsonl", *({"prompt": "x?", "completion": each} for each in answers))
    for overflow, reasons in (
        ("truncate", {2: "cut from", 4: "no token to learn", 5: "cut from"}),
        ("drop", {2: "tokens", 4: "no token to learn", 5: "tokens"}),
    ):
        data = {"train": str(path), "max_length": 64, "overflow": overflow}
        found = check(load_recipe(on_disk.recipe(tmp_path / "r.yaml", tiny_folder, data)), Screen(), 0)
        said = capsys.readouterr().err
        assert [each["where"] for each in found["rejected"]] == [f"{path}:{line}" for line in reasons]
        for each, reason in zip(found["rejected"], reasons.values(), strict=True):
            assert reason in each["reason"]
            assert each["where"] in said.replace("\n", "")
    with pytest.raises(UserError) as caught:
        check(
            load_recipe(
                on_disk.recipe(tmp_path / "r.yaml", tiny_folder, {"train": str(path), "max_length": 64})
            ),
            Screen(),
            0,
        )
    assert all(f"{path}:{line} (" in caught.value.what for line in (2, 4, 5))


# Memory

GROWTH = """
import resource, sys
from pathlib import Path
from lora_cli.data import load
from lora_cli.data.pack import epoch_order
from lora_cli.recipe.schema import DataRecipe
from tests import tiny
folder, tokenizer = Path(sys.argv[1]), tiny.tokenizer(None)
for count in map(int, sys.argv[2:]):
    path = folder / f"{count}.jsonl"
    with path.open("w") as file:
        file.writelines(f'{{"prompt": "{i}?", "completion": "{i}"}}\\n' for i in range(count))
    data = DataRecipe.model_validate({"train": str(path), "eval_fraction": 0.01})
    found = load.load(data, tokenizer, cache=folder / "cache", seed=0).train
    assert found.counts.rows > 0.98 * count
    assert all(found[int(i)].input_ids for i in epoch_order(found, 0, 0)[:: len(found) // 1000])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
COUNTS = (10_000, 1_000_000 if os.environ.get("LORA_LONG") else 100_000)


def test_memory_is_flat_in_the_number_of_rows(tmp_path):
    command = [sys.executable, "-c", GROWTH, str(tmp_path), *map(str, COUNTS)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    few, many = map(int, subprocess.check_output(command, text=True, env=environment).split())
    assert many - few <= 64 * 2**20
