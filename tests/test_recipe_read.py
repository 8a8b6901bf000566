"""Whatever the bytes, a recipe file is a tree with places or one message with a place."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.errors import UserError
from lora_cli.recipe import layers, load, read
from tests.recipe_values import as_yaml, recipes

QUICK = settings(deadline=None, database=None)
HERE = "r.yaml"

# the table of tag resolution in the YAML 1.2 specification, section 10.3.2, and what YAML 1.1 made of such words
SCALARS = {
    "null": None, "Null": None, "NULL": None, "~": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
    "no": "no", "yes": "yes", "on": "on", "off": "off", "No": "No", "y": "y", "tRUE": "tRUE",
    "0": 0, "-19": -19, "+12": 12, "012": 12, "0o14": 12, "0xC": 12, "0x3a": 58,
    "1_000": "1_000", "0b11": "0b11", "190:20:30": "190:20:30", "1,000": "1,000",
    "1e-4": 1e-4, "2e-4": 2e-4, "1E3": 1e3, "1.5": 1.5, ".5": 0.5, "5.": 5.0, "-.5": -0.5, "12e03": 12e3,
    "-2E+05": -2e5, "0.": 0.0, "-0.0": 0.0, "1e": "1e", ".": ".", "e5": "e5", "1.2.3": "1.2.3",
    ".inf": ".inf", "-.INF": "-.INF", ".nan": ".nan", "inf": "inf", "nan": "nan", "1e999": "1e999",
    "2002-12-14": "2002-12-14", "=": "=", "1" * 301: "1" * 301,
}  # fmt: skip


def parsed(text: str) -> read.Marked:
    return read.read_text(text, lambda line: f"{HERE}:{line}")


def refused(content: bytes, folder: Path) -> UserError:
    path = folder / HERE
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load.load(path)
    return caught.value


@pytest.mark.parametrize(("written", "meant"), SCALARS.items())
def test_scalars_follow_yaml_1_2_core(written: str, meant: object) -> None:
    value = layers.plain(parsed(f"a: {written}"))["a"]
    assert (type(value), value) == (type(meant), meant)
    assert layers.plain(parsed(f"a: '{written}'"))["a"] == written, "in quotes it is text"
    assert layers.plain(parsed(f"{written}: 1")) == {written: 1}, "a key is text"


@given(st.integers(-(10**20), 10**20), st.floats(allow_nan=False, allow_infinity=False))
@QUICK
def test_numbers_mean_what_python_says(whole: int, real: float) -> None:
    assert layers.plain(parsed(f"[{whole}, {real!r}]")) == (whole, real)


@given(recipes())
@QUICK
def test_every_value_knows_its_line(values: dict[str, object]) -> None:
    text, at = as_yaml(values)
    tree = parsed(text)
    for key, line in at.items():
        assert layers.place(tree, tuple(key.split("."))) == f"{HERE}:{line}"


HOPELESS = {
    "NUL": (b"model:\n  name: a\0b\n", 2),
    "tab": (b"model:\n\tname: a\n", 2),
    "BOM": (b"\xef\xbb\xbfmodel:\n  name: a\n", 1),
    "UTF-16": ("model:\n  name: a\n".encode("utf-16"), 1),
    "not UTF-8": (b"model:\n  name: \xe9t\xe9\n", 2),
    "half a character": (b"model:\n  name: \xe2\x82\n", 2),
    "zero-width space": ("model:\n  name: a\u200bb\u2028\n".encode(), 2),
    "tag": (b"model:\n  name: !!python/object/apply:os.system [ls]\n", 2),
    "tag of our own": (b"model: !x {name: a}\n", 1),
    "tag on a key": (b"model:\n  !x name: a\n", 2),
    "merge key": (b"a: &a {r: 1}\nadapter:\n  <<: *a\n", 3),
    "cycle": (b"model: &a\n  name: *a\n", 2),
    "cycle in a list": (b"data:\n  train: &a [*a]\n", 2),
    "unknown alias": (b"model:\n  name: *a\n", 2),
    "key that is a list": (b"? [a]\n: 1\n", 1),
    "empty key": (b"model:\n  : a\n", 2),
    "second document": (b"model:\n  name: a\n---\nb: 1\n", 3),
    "unclosed bracket": (b"model: {name: a\n", 2),
    "unclosed quote": (b'model:\n  name: "a\n', 3),
    "two colons": (b"model:\n  name: a: b\n", 2),
    "indentation": (b"model:\n  name: a\n dtype: b\n", 3),
    "escape out of range": (b'model: {name: "\\UFFFFFFFF"}\n', 1),
    "escaped half of a pair": (b'model:\n  name: "\\ud800"\n', 2),
    "escaped NUL": (b'model:\n  name: "\\0"\n', 2),
    "version out of range": (b"%YAML 1." + b"9" * 5000 + b"\n---\na: b\n", 1),
    "deep list": (b"a:\n  " + b"[" * 40 + b"]" * 40, 2),
    "very deep list": (b"[" * 100_000, 1),
    "deep mapping": (b"{a: " * 5_000, 1),
    "many keys": (b"\n".join(b"a%d: 1" % i for i in range(6_000)), 5_000),
}


@pytest.mark.parametrize("case", HOPELESS)
def test_hopeless_files_get_one_message_with_the_line(case: str, tmp_path: Path) -> None:
    content, line = HOPELESS[case]
    error = refused(content, tmp_path)
    places = re.findall(r"r\.yaml:(\d+): ", str(error))
    assert str(line) in places, str(error)
    assert "python" not in str(error).replace("python/object", "").lower()


def test_a_small_file_cannot_grow_by_aliases(tmp_path: Path) -> None:
    doubling = "\n".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 25))
    error = refused(f"a0: &a0 [x, x]\n{doubling}\n".encode(), tmp_path)
    assert "10000" in error.what
    deepening = "\n".join(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 60))
    assert "deeper" in refused(f"a0: &a0 [x]\n{deepening}\n".encode(), tmp_path).what


RIGHT = "model: {name: m}\ndata: {train: a}\n"
MOST_STEPS = 10_000_000
"""Lines of Python, half a second of them. Most of all takes "[[[[": PyYAML looks for a key 1024 characters ahead."""
BOMBS = {
    "doubling aliases": "a0: &a0 [x, x]\n"
    + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 25)),
    "one wide alias": "a: &a [" + "x," * 999 + "]\nb: [" + "*a," * 999 + "]\n",
    "open brackets": "[" * 20_000,
    "open braces": "{a: " * 5_000,
    "unknown keys": RIGHT + "".join(f"learning_rate_{i}: 1\n" for i in range(2_000)),
    "keys named twice": RIGHT + "".join(f"a{i}: 1\na{i}: 1\n" for i in range(1_000)),
    "wrong items": RIGHT + "adapter: {target_modules: [" + "5," * 4_000 + "]}\n",
    "wrong patterns": RIGHT
    + "adapter: {rank_pattern: {"
    + "".join(f"a{i}: x, " for i in range(2_000))
    + "}}\n",
    "wrong sources": "model: {name: m}\ndata: {train: [" + "{a: 1}," * 1_500 + "]}\n",
    "variants of many values": (
        f"{RIGHT}adapter: {{rank_pattern: {{{''.join(f'a{i}: 1, ' for i in range(1_500))}}}}}\n"
        f"compare: {{{''.join(f'v{i}: , ' for i in range(1_500))}}}\n"
    ),
    "variants of mistakes": RIGHT
    + "compare: {"
    + "".join(f"v{i}: {{x: 1, y: 1}}, " for i in range(500))
    + "}\n",
    "a key of many dots": RIGHT + "compare:\n  v:\n    ? " + "a." * 5_000 + "b\n    : 1\n",
    "a simple key of many dots": RIGHT + "compare:\n  v:\n    " + "a." * 500 + "b: 1\n",
    "many keys of many dots": RIGHT
    + "compare:\n  v:\n"
    + "".join(f"    a{i}{'.a' * 40}: 1\n" for i in range(500)),
    "a long key": RIGHT + "? " + "a" * 20_000 + "\n: 1\n",
    "a long name": RIGHT + "adapter: {method: " + "a" * 20_000 + "}\n",
    "a long number": RIGHT + "adapter: {r: 1." + "1" * 20_000 + "}\n",
    "a deep pattern": RIGHT + "adapter: {target_modules: '" + "(" * 20_000 + "'}\n",
    "variables": RIGHT + "output: {dir: '" + "${" * 10_000 + "'}\n",
    "tags": "a: [" + "!x y, " * 5_000 + "]\n",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_small_file_is_refused_after_little_work(bomb: str, tmp_path: Path) -> None:
    """Counted in lines of Python, which a busy machine does not change."""
    content = BOMBS[bomb].encode()
    refused(b"a: b\n", tmp_path)
    steps = 0

    def count(frame: object, event: str, argument: object) -> object:
        nonlocal steps
        steps += event == "line"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        error = refused(content, tmp_path)
    finally:
        sys.settrace(before)
    assert steps < MOST_STEPS
    assert len(str(error)) < 50_000


def test_a_line_of_more_mistakes_than_anyone_reads_ends_the_message(tmp_path: Path) -> None:
    told = str(refused(BOMBS["unknown keys"].encode(), tmp_path)).split("\n")
    assert len(told) == 2 * (load.MOST + 1)
    assert told[-2:] == [
        f"{tmp_path}/r.yaml:{load.MOST + 3}: more than {load.MOST} mistakes",
        "  → mend these first",
    ]


def test_an_alias_is_its_value_again() -> None:
    assert layers.plain(parsed("a: &x {r: 1}\nb: *x\nc: [*x, *x]")) == {
        "a": {"r": 1}, "b": {"r": 1}, "c": ({"r": 1}, {"r": 1}),
    }  # fmt: skip


def test_only_regular_files_of_sane_size_are_read(tmp_path: Path) -> None:
    big = tmp_path / "big.yaml"
    big.write_bytes(b"#" * (2**20 + 1))
    (tmp_path / "recipe.yaml").write_text("a: 1")
    cases = {
        tmp_path: "not a file",
        Path("/dev/zero"): "not a file",
        big: "larger",
        tmp_path / "none": "no such",
    }
    for path, reason in cases.items():
        with pytest.raises(UserError, match=reason):
            load.load(path)
    with pytest.raises(UserError) as caught:
        load.load(tmp_path / "recpie.yaml")
    assert "recipe.yaml" in caught.value.fix


@given(st.binary(max_size=200) | st.text("{}[]&*!|>'\"%@`:-#?, \n\\$ab01~<", max_size=80).map(str.encode))
@settings(QUICK, max_examples=1500)
def test_no_bytes_give_a_traceback(content: bytes) -> None:
    error = complaint(lambda: read.read_text(read._decode(content, HERE), lambda line: f"{HERE}:{line}"))
    assert error is None or re.match(r"r\.yaml:\d+$", error.where), error.where


def complaint(act: Callable[[], object]) -> UserError | None:
    """The one kind of error that may come out."""
    try:
        act()
    except UserError as error:
        return error
    return None
