"""Rows come out as they stand in the file, in order, with the line they stand on; what is broken is named by line."""

import csv
import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.data import files, tables
from lora_cli.data.source import fingerprint, read_rows, snapshot
from lora_cli.errors import ExitCode, UserError
from lora_cli.recipe.schema import WeightedSource

text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
record = st.dictionaries(text, value, max_size=4)
space = st.text(st.sampled_from(" \t"), max_size=2)
fresh = settings(max_examples=40, deadline=None)


def read(path, split="train"):
    """Values and lines of one source."""
    return [(row.values, row.where) for _, row in read_rows((WeightedSource(path=str(path)),), split)]


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for many drawn files: each draw overwrites the last."""
    return tmp_path_factory.mktemp("drawn")


@fresh
@given(
    records=st.lists(record, min_size=1, max_size=6),
    ascii_only=st.booleans(),
    mark=st.booleans(),
    data=st.data(),
)
def test_jsonl_rows_come_back_with_their_lines(folder, records, ascii_only, mark, data):
    lines, expected = [], []
    for item in records:
        lines.extend(data.draw(st.lists(space, max_size=2)))
        lines.append(data.draw(space) + json.dumps(item, ensure_ascii=ascii_only) + data.draw(space))
        expected.append((item, len(lines)))
    end = data.draw(st.sampled_from(["\n", "\r\n"]))
    content = end.join(lines) + data.draw(st.sampled_from(["", end, end * 3]))
    path = written(folder, "rows.jsonl", b"\xef\xbb\xbf" * mark + content.encode())
    assert read(path) == [(item, f"{path}:{line}") for item, line in expected]


@fresh
@given(records=st.lists(record, min_size=1, max_size=5), indent=st.none() | st.integers(0, 3), data=st.data())
def test_json_rows_come_back_with_the_lines_they_start_on(folder, records, indent, data):
    gap = st.text(st.sampled_from(" \n\t"), max_size=4)
    content, lines = data.draw(gap) + "[", []
    for i, item in enumerate(records):
        content += "," * (i > 0) + data.draw(gap)
        lines.append(content.count("\n") + 1)
        content += json.dumps(item, indent=indent, ensure_ascii=data.draw(st.booleans())) + data.draw(gap)
    path = written(folder, "rows.json", content + "]" + data.draw(gap))
    assert read(path) == [(item, f"{path}:{line}") for item, line in zip(records, lines, strict=True)]


@fresh
@given(
    rows=st.lists(st.tuples(text, text, text), min_size=1, max_size=6), end=st.sampled_from(["\n", "\r\n"])
)
def test_csv_rows_come_back_with_the_lines_they_start_on(folder, rows, end):
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerow(["a", "b", "c d"])
    lines = []
    for row in rows:
        lines.append(out.getvalue().count("\n") + 1)
        writer.writerow(row)
    path = written(folder, "rows.csv", out.getvalue())
    expected = [({"a": a, "b": b, "c d": c}, f"{path}:{n}") for (a, b, c), n in zip(rows, lines, strict=True)]
    assert read(path) == expected


@fresh
@given(
    st.lists(
        st.lists(text.map(lambda s: s.replace("\n", " ").replace("\r", " ") + "."), min_size=1), min_size=1
    )
)
def test_text_is_read_by_paragraphs(folder, paragraphs):
    content, expected = "\n", []
    path = folder / "rows.txt"
    for lines in paragraphs:
        expected.append(({"text": "\n".join(lines)}, f"{path}:{content.count(chr(10)) + 1}"))
        content += "\r\n".join(lines) + "\n \n\n"
    written(folder, "rows.txt", content)
    assert read(path) == expected


@fresh
@given(st.lists(st.tuples(text, st.none() | st.integers(-9, 9)), min_size=1, max_size=5))
def test_parquet_rows_equal_the_same_rows_in_jsonl(folder, rows):
    records = [{"text": a, "n": b, "deep": [{"role": a, "x": b}]} for a, b in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), folder / "rows.parquet")
    lines = [
        {**item, "deep": [{k: v for k, v in item["deep"][0].items() if v is not None}]} for item in records
    ]
    written(folder, "same.jsonl", "\n".join(map(json.dumps, lines)))
    found = read(folder / "rows.parquet")
    assert [row for row, _ in found] == [row for row, _ in read(folder / "same.jsonl")]
    assert [where for _, where in found] == [
        f"{folder / 'rows.parquet'}:{n}" for n in range(1, len(rows) + 1)
    ]


GOOD = '{"text": "fine"}\n'
BROKEN = {
    "broken JSON": ("a.jsonl", GOOD + '{"text": "x",}\n', 2, "not valid JSON"),
    "cut JSON": ("a.jsonl", GOOD + '{"text": "x' + "\n" + GOOD, 2, "not valid JSON"),
    "two values": ("a.jsonl", GOOD + GOOD.strip() * 2, 2, "more text"),
    "not an object": ("a.jsonl", GOOD + "[1, 2]\n", 2, "expected an object"),
    "a bare number": ("a.jsonl", GOOD + "7\n", 2, "got a number"),
    "NaN": ("a.jsonl", GOOD + '{"text": NaN}\n', 2, "NaN"),
    "minus infinity": ("a.jsonl", GOOD + '{"text": -Infinity}\n', 2, "Infinity"),
    "too large a number": ("a.jsonl", GOOD + '{"n": 1e999}\n', 2, "1e999"),
    "too long a number": ("a.jsonl", GOOD + f'{{"n": {"9" * 5000}}}\n', 2, "not valid JSON"),
    "a key twice": ("a.jsonl", GOOD + '{"a": {"b": 1, "b": 2}}\n', 2, "'b' is given twice"),
    "deep nesting": ("a.jsonl", GOOD + '{"a": ' + "[" * 70 + "]" * 70 + "}\n", 2, "nested"),
    "endless nesting": ("a.jsonl", GOOD + '{"a": ' + "[" * 99_999, 2, "nested"),
    "half a character": ("a.jsonl", GOOD + '{"a": "\\ud83d"}\n', 2, "surrogate"),
    "not UTF-8": ("a.jsonl", GOOD.encode() + b'{"a": "\xe9t\xe9"}\n', 2, "0xe9"),
    "UTF-16": ("a.jsonl", GOOD.encode("utf-16"), 1, "not UTF-8"),
    "NUL": ("a.jsonl", GOOD.encode() + b'{"a": "\0"}\n', 2, "NUL"),
    "mark in the middle": ("a.jsonl", GOOD + "\ufeff" + GOOD, 2, "not valid JSON"),
    "broken JSON list": ("a.json", '[\n{"a": 1},\n\n{"a": \n1 2}\n]', 5, "not valid JSON"),
    "open JSON list": ("a.json", '[\n{"a": 1}\n', 3, "expected ','"),
    "comma too many": ("a.json", '[\n{"a": 1},\n]', 2, "expected ','"),
    "text after the list": ("a.json", '[\n{"a": 1}\n]\n\n{}', 3, "after the list"),
    "key twice in a list": ("a.json", '[\n{"a": 1},\n{"b": 1,\n"b": 2}]', 3, "'b' is given twice"),
    "objects over lines": ("a.json", '{\n"a": 1}\n', 1, "not valid JSON"),
    "fields too many": ("a.csv", "a,b\n1,2\n1,2,3\n", 3, "3 fields"),
    "fields too few": ("a.csv", 'a,b\n"1\n1",2\n1\n', 4, "1 fields"),
    "open quote": ("a.csv", 'a,b\n1,"2\n', 2, "not valid CSV"),
    "column twice": ("a.csv", "a,a\n1,2\n", 1, "given twice"),
    "column without a name": ("a.csv", "a,\n1,2\n", 1, "empty"),
    "CSV not UTF-8": ("a.csv", b"a\n\xff\n", 2, "0xff"),
    "text not UTF-8": ("a.txt", b"fine\n\n\xff\n", 3, "0xff"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named_by_file_and_line(tmp_path, name):
    file, content, line, reason = BROKEN[name]
    path = written(tmp_path, file, content)
    with pytest.raises(UserError) as caught:
        read(path)
    assert caught.value.where == f"{path}:{line}"
    assert reason in caught.value.what
    assert caught.value.code == ExitCode.DATA


@pytest.mark.parametrize("file", ["a.jsonl", "a.csv", "a.txt"])
def test_a_line_over_the_limit_is_refused_before_it_is_read(tmp_path, monkeypatch, file):
    monkeypatch.setattr(files, "LINE_LIMIT", 1000)
    path = written(tmp_path, file, "a\n\n" + "x" * 5000)
    if file == "a.jsonl":
        path.write_text(GOOD + "x" * 5000)
    with pytest.raises(UserError, match="longer than") as caught:
        read(path)
    assert caught.value.where.startswith(f"{path}:")


def test_paragraphs_and_json_lists_have_limits_too(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LINE_LIMIT", 1000)
    monkeypatch.setattr(files, "JSON_LIMIT", 1000)
    with pytest.raises(UserError, match="paragraph is longer"):
        read(written(tmp_path, "a.txt", "short line\n" * 200))
    with pytest.raises(UserError, match="larger than"):
        read(written(tmp_path, "a.json", json.dumps([{"a": i} for i in range(300)])))


@pytest.mark.parametrize("file", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.parquet"])
@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_a_file_without_rows_is_an_error(tmp_path, file, content):
    with pytest.raises(UserError) as caught:
        read(written(tmp_path, file, content))
    assert str(tmp_path / file) in caught.value.where
    assert caught.value.code == ExitCode.DATA


def test_header_or_empty_list_alone_hold_no_rows(tmp_path):
    for file, content in (("a.csv", "a,b\n"), ("a.json", "[ ]")):
        with pytest.raises(UserError, match="no rows"):
            read(written(tmp_path, file, content))


def test_a_missing_file_is_named_with_the_nearest_that_exists(tmp_path):
    written(tmp_path, "reviews.jsonl", GOOD)
    with pytest.raises(UserError, match="no such file") as caught:
        read(tmp_path / "review.jsonl")
    assert "reviews.jsonl" in caught.value.fix


def test_a_missing_folder_in_a_folder_that_exists_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    with pytest.raises(UserError) as caught:
        read("data/reviews")
    assert caught.value.what == "no such file or folder"


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.pkl", "a", "a.npy"])
def test_unknown_kinds_of_files_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="unknown kind"):
        read(written(tmp_path, name, GOOD))


def test_a_folder_is_its_files_in_order_and_hidden_ones_are_passed_over(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c/d.jsonl", ".hidden.jsonl", ".git/e.jsonl", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        written(tmp_path, name, json.dumps({"name": name}))
    assert [row["name"] for row, _ in read(tmp_path)] == ["a.jsonl", "b.jsonl", "c/d.jsonl"]


def test_a_folder_that_mixes_splits_is_refused(tmp_path):
    for name in ("my_train.jsonl", "my-test.jsonl"):
        written(tmp_path, name, GOOD)
    for split in ("train", "eval"):
        with pytest.raises(UserError, match="another split"):
            read(tmp_path, split)


def test_an_empty_folder_and_a_device_are_refused(tmp_path):
    with pytest.raises(UserError, match="no data files"):
        read(tmp_path)
    with pytest.raises(UserError, match="neither a file"):
        read("/dev/zero")


def test_sources_keep_their_order_and_number(tmp_path):
    paths = [written(tmp_path, f"{name}.jsonl", GOOD * 2) for name in "ba"]
    sources = tuple(WeightedSource(path=str(path)) for path in paths)
    assert [(index, row.where) for index, row in read_rows(sources, "train")] == [
        (i, f"{path}:{line}") for i, path in enumerate(paths) for line in (1, 2)
    ]


def test_rows_before_a_broken_one_come_first(tmp_path):
    path = written(tmp_path, "a.jsonl", GOOD * 3 + "{")
    rows = read_rows((WeightedSource(path=str(path)),), "train")
    assert [next(rows)[1].where for _ in range(3)] == [f"{path}:{n}" for n in (1, 2, 3)]
    with pytest.raises(UserError):
        next(rows)


def test_the_fingerprint_follows_the_content_and_the_snapshot_the_file(tmp_path):
    path = written(tmp_path, "a.jsonl", GOOD)
    sources = (WeightedSource(path=str(path)),)
    print_before, before = fingerprint(sources, "train"), snapshot(sources, "train")
    assert fingerprint(sources, "train") == print_before
    assert snapshot(sources, "train") == before
    written(tmp_path, "a.jsonl", GOOD.replace("fine", "best"))
    assert fingerprint(sources, "train") != print_before
    assert snapshot(sources, "train") != before


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that `datasets` loads with the same code as an id on the Hub."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "published"
    folder.mkdir()
    for split, count in (("train", 3), ("test", 2)):
        rows = [{"text": f"{split} {i}", "deep": [{"x": i}]} for i in range(count)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}.parquet")
    return str(folder)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_datasets_are_streamed_with_the_split_that_stands_for_ours(hub):
    def rows(split, name=None):
        wanted = tables.Hub(WeightedSource(path=hub, split=name), split)
        return [(row.values["text"], row.where) for row in wanted.rows()]

    assert rows("train") == [(f"train {i}", f"{hub}:{i + 1}") for i in range(3)]
    assert rows("eval") == rows("train", "test") == [(f"test {i}", f"{hub}:{i + 1}") for i in range(2)]
    with pytest.raises(UserError, match="no split named dev") as caught:
        rows("train", "dev")
    assert "train" in caught.value.fix
    prints = {
        tables.Hub(WeightedSource(path=hub), split).fingerprint() for split in ("train", "eval", "train")
    }
    assert len(prints) == 2


def test_a_failing_hub_is_an_error_for_a_person(monkeypatch):
    import datasets

    def refuse(*_):
        raise ConnectionError("Couldn't reach it\nlong story")

    monkeypatch.setattr(datasets, "get_dataset_split_names", refuse)
    with pytest.raises(UserError, match="Couldn't reach it") as caught:
        read("nobody/nothing")
    assert caught.value.where == "nobody/nothing"
    assert caught.value.code == ExitCode.DATA


def test_split_belongs_to_the_hub_alone(tmp_path):
    path = written(tmp_path, "a.jsonl", GOOD)
    with pytest.raises(UserError, match="'split' is for ids"):
        list(read_rows((WeightedSource(path=str(path), split="test"),), "train"))
