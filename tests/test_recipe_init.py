"""What `lora init` writes loads, says what was answered, and guesses formats from the first row."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.recipe import init, layers, load, read
from lora_cli.recipe.schema import PromptFormat

QUICK = settings(deadline=None, database=None)
TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=30)
ANSWERS = st.builds(
    init.Answers,
    model=TEXT,
    train=TEXT,
    eval=st.none() | TEXT,
    format=st.sampled_from(["auto", "messages", "text"])
    | st.builds(PromptFormat, prompt=TEXT, completion=TEXT),
    method=st.sampled_from(["lora", "rslora"]),
    r=st.integers(1, 512),
    alpha=st.none() | st.floats(0.1, 1e3),
    epochs=st.floats(0.1, 100),
    learning_rate=st.floats(1e-8, 1),
    max_length=st.integers(1, 10**6),
    output=st.none() | TEXT,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


@given(answers=ANSWERS)
@QUICK
def test_whatever_was_answered_the_recipe_loads_and_says_so(folder: Path, answers: init.Answers) -> None:
    path = folder / "mine.yaml"
    path.write_text(init.write(answers), encoding="utf-8")
    recipe = load.load(path).recipe
    assert recipe.model.name == answers.model
    assert recipe.data.train[0].path == answers.train
    assert (recipe.data.eval[0].path if recipe.data.eval else None) == answers.eval
    assert (recipe.data.eval is None) == (recipe.data.eval_fraction > 0)
    assert recipe.data.format == answers.format
    assert (recipe.adapter.method, recipe.adapter.r) == (answers.method, answers.r)
    assert recipe.adapter.alpha == (answers.alpha or 2 * answers.r)
    assert (recipe.train.epochs, recipe.train.learning_rate) == (answers.epochs, answers.learning_rate)
    assert recipe.output.dir == (answers.output or "runs/mine")


def test_the_text_is_short_and_commented() -> None:
    lines = init.write(init.Answers(model="m", train="a.jsonl")).splitlines()
    assert len(lines) < 40
    assert sum("#" in line for line in lines) >= 6
    assert all(len(line) <= 120 for line in lines)


ROWS: list[tuple[dict[str, Any], Any]] = [
    ({"messages": []}, "messages"),
    ({"id": 1, "messages": []}, "messages"),
    ({"conversations": []}, "sharegpt"),
    ({"instruction": "a", "input": "b", "output": "c"}, "alpaca"),
    ({"instruction": "a", "output": "c"}, "alpaca"),
    ({"text": "a"}, "text"),
    ({"prompt": "a", "completion": "b"}, PromptFormat(prompt="{prompt}", completion="{completion}")),
    ({"text": "a", "label": "b"}, PromptFormat(prompt="{text}\nLabel:", completion=" {label}")),
    ({"question": "a", "answer": "b"}, PromptFormat(prompt="{question}\nAnswer:", completion=" {answer}")),
    ({"x": "a", "y": "b"}, "auto"),
    ({"a b": "a", "label": "b"}, "auto"),
    ({}, "auto"),
]


@pytest.mark.parametrize(("row", "guess"), ROWS)
def test_the_format_is_guessed_from_the_columns(folder: Path, row: dict[str, Any], guess: Any) -> None:
    table = io.StringIO()
    writer = csv.DictWriter(table, row)
    writer.writeheader()
    writer.writerow(row)
    contents = {
        "a.jsonl": json.dumps(row) + "\n{",
        "a.json": json.dumps([row, row]),
        "a.csv": table.getvalue(),
    }
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8")
        assert init.suggest(folder / name) == guess


@given(content=st.binary(max_size=60), ending=st.sampled_from(["jsonl", "json", "csv", "parquet", "txt"]))
@QUICK
def test_no_data_file_breaks_the_guess(folder: Path, content: bytes, ending: str) -> None:
    path = folder / f"b.{ending}"
    path.write_bytes(content)
    assert init.suggest(path) is not None
    assert init.suggest(folder / "none.jsonl") == init.suggest(folder) == "auto"


def test_deeply_nested_data_does_not_break_the_guess(folder: Path) -> None:
    path = folder / "deep.jsonl"
    path.write_text("[" * 200_000)
    assert init.suggest(path) == "auto"


def test_a_format_written_by_hand_reads_back() -> None:
    answers = init.Answers(
        model="m", train="a", format=PromptFormat(prompt="{a} # b: \n", completion=" ${c}")
    )
    tree = layers.plain(read.read_text(init.write(answers), str))
    assert tree["data"]["format"] == {"prompt": "{a} # b: \n", "completion": " ${c}"}
