"""A first recipe from a few answers: what `lora init` writes.

suggest     a data file -> the format of its rows, from the columns of the first one
write       answers -> the text of a commented recipe
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

from lora_cli.recipe.dump import text
from lora_cli.recipe.schema import PromptFormat

FIRST_ROW = 2**20
"""Characters that are looked at to find the first row."""
ANSWERS = ("completion", "output", "answer", "response", "target", "label", "summary", "translation")


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What someone said who wants a recipe."""

    model: str
    train: str
    eval: str | None = None
    """Held-out rows; when not given, some training rows are held out."""
    format: str | PromptFormat = "auto"
    method: str = "lora"
    r: int = 16
    alpha: float | None = None
    """Default: 2 · r."""
    epochs: float = 1
    learning_rate: float = 2e-4
    max_length: int = 1024
    output: str | None = None


def suggest(data: Path) -> str | PromptFormat:
    """The format that the rows of a file most likely have; `auto` when that cannot be told."""
    columns = _columns(data)
    if "messages" in columns:
        return "messages"
    if "conversations" in columns:
        return "sharegpt"
    if {"instruction", "output"} <= set(columns):
        return "alpaca"
    if columns == ("text",):
        return "text"
    return _templates(columns) or "auto"


def write(answers: Answers) -> str:
    """The text of a short recipe that loads.

    Values are quoted where needed; whether they make sense is for the loader to say.
    """
    held_out = f"eval: {text(answers.eval)}" if answers.eval else "eval_fraction: 0.05"
    alpha = answers.alpha if answers.alpha is not None else 2 * answers.r
    output = f"\noutput:\n  dir: {text(answers.output)}\n" if answers.output else ""
    return f"""\
# Next: `lora check` shows what this would do, `lora train` does it. Every key: `lora schema`, recipes/lora.yaml.

model:
  name: {text(answers.model)}

data:
  train: {text(answers.train)}
  {held_out}  # held-out rows, to see whether it learns more than the training rows
{_format(answers.format)}
  max_length: {answers.max_length}  # tokens; with a longer example nothing starts, see overflow: drop, truncate

adapter:
  method: {text(answers.method)}  # `lora methods` lists them
  r: {answers.r}  # size of the adapter: 8 to 64 is usual
  alpha: {text(alpha)}  # the adapter is scaled by alpha / r
  target_modules: all-linear

train:
  epochs: {text(answers.epochs)}
  batch_size: 16  # examples per optimizer step; memory does not depend on it
  learning_rate: {text(answers.learning_rate)}  # 1e-4 to 1e-3 is usual for adapters
  lr_scheduler: linear
  warmup_ratio: 0.03
{output}"""


def _format(value: str | PromptFormat) -> str:
    if isinstance(value, str):
        return f"  format: {text(value)}"
    return (
        "  format:  # {column} is replaced by the row's value\n"
        f"    prompt: {text(value.prompt)}\n"
        f"    completion: {text(value.completion)}  # only this is learned"
    )


def _templates(columns: tuple[str, ...]) -> PromptFormat | None:
    """Templates for rows of one answer and one other column."""
    answer = next((column for column in ANSWERS if column in columns), "")
    others = [column for column in columns if column != answer]
    if not answer or len(others) != 1 or not all(column.isidentifier() for column in columns):
        return None
    prompt, completion = f"{{{others[0]}}}", f"{{{answer}}}"
    if others[0] == "prompt":
        return PromptFormat(prompt=prompt, completion=completion)
    return PromptFormat(prompt=f"{prompt}\n{answer.capitalize()}:", completion=f" {completion}")


def _columns(data: Path) -> tuple[str, ...]:
    """The columns of the first row; none when the file cannot be read this way: `lora check` says why."""
    try:
        with data.open(encoding="utf-8-sig", newline="") as file:
            head = file.read(FIRST_ROW).lstrip()
        if data.suffix == ".csv":
            return tuple(next(csv.reader(head.splitlines()), ()))
        if data.suffix not in (".jsonl", ".json"):
            return ()
        row, _ = json.JSONDecoder().raw_decode(head.removeprefix("[").lstrip())
    except (OSError, ValueError, RecursionError, csv.Error):
        return ()
    return tuple(row) if isinstance(row, dict) else ()
