"""`lora generate`: answers to one prompt or to a file of them, from the adapter and, to compare, from the base."""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_cli.data import columns
from lora_cli.data import format as formats
from lora_cli.data.format import Format
from lora_cli.data.source import Row, read_rows
from lora_cli.data.tokens import Ids
from lora_cli.errors import ExitCode, UserError
from lora_cli.evaluate import generation
from lora_cli.recipe.schema import DataRecipe, EvalRecipe, PromptFormat, Recipe, WeightedSource
from lora_cli.run.open import Opened, best_device, open_model
from lora_cli.screen import Screen


@dataclass(frozen=True)
class Generation:
    """What is asked for."""

    prompt: str | None
    """One question; a user's message where there is a chat template."""
    rows: Path | None
    """A file of them, read as the recipe reads its rows, or with a column `prompt` or `messages`."""
    compare: bool = False
    """Answer with the base as well."""
    max_new_tokens: int | None = None
    """Longest answer; default: the recipe's `eval.max_new_tokens`."""
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Asked:
    """One prompt."""

    ids: Ids
    text: str
    where: str = ""
    expected: str = ""


def generate(
    path: Path, wanted: Generation, screen: Screen, *, base: str | None = None, as_json: bool = False
) -> None:
    """Answer on stdout: as text, or as one JSON object a line. A single answer is shown while it is written.

    Args:
        path: adapter folder, run folder, or model.
        wanted: what to answer, and how.
        screen: for progress and notes.
        base: use this model instead of the one the adapter names.
        as_json: objects with prompt, where, expected, and an answer under `base` or `adapter`.

    Raises:
        UserError: anything the user can mend.
    """
    if (wanted.prompt is None) == (wanted.rows is None):
        raise UserError("give either --prompt or --input")
    opened = open_model([path], base=base, device=best_device())
    asked = _asked(opened, wanted, screen)
    alone = wanted.prompt is not None and not wanted.compare and not as_json
    if alone and sys.stdout.isatty():
        _stream(opened, asked[0], wanted)
        return
    answers = {name: _answers(name, opened, asked, wanted, screen) for name in _names(opened, wanted)}
    for index, each in enumerate(asked):
        written = {name: texts[index] for name, texts in answers.items()}
        print(_json(each, written) if as_json else _readable(each, written, alone))


def prompt_format(data: DataRecipe, tokenizer: PreTrainedTokenizerBase) -> Format:
    """How the prompts of a recipe become ids, told without needing its training rows, which may be elsewhere now."""
    first = data.train[0]
    here = data.format == "auto" and Path(first.path).expanduser().exists()
    known = next(read_rows((first,), "train"))[1].values if here else ("prompt",)
    return formats.make(data, tokenizer, known)


def data_of(recipe: Recipe | None) -> DataRecipe:
    """The recipe's `data`; without a recipe what fits a model as it comes: its own chat template if it has one."""
    return recipe.data if recipe else DataRecipe.model_validate({"train": "unknown"})


def _asked(opened: Opened, wanted: Generation, screen: Screen) -> list[Asked]:
    data, tokenizer = data_of(opened.recipe), opened.language.tokenizer
    if wanted.rows is not None:
        return _from_rows(data, wanted.rows, tokenizer)
    assert wanted.prompt is not None, "one of the two is given"
    if isinstance(data.format, PromptFormat) and not _is_bare(data.format.prompt):
        screen.note(f"the prompt is used as it stands; the adapter learned from {data.format.prompt!r}")
    return [
        Asked(_not_empty(prompt_format(data, tokenizer).prompt_ids(wanted.prompt), "--prompt"), wanted.prompt)
    ]


def _from_rows(data: DataRecipe, file: Path, tokenizer: PreTrainedTokenizerBase) -> list[Asked]:
    rows = [row for _, row in read_rows((WeightedSource(path=str(file)),), "eval")]
    if not all(_fits(data.format, row) for row in rows):
        data = data.model_copy(update={"format": "auto"})
    form = formats.make(data, tokenizer, rows[0].values)
    questions = [form.question(row) for row in rows]
    return [Asked(_not_empty(q.prompt_ids, q.where), q.prompt, q.where, q.answer) for q in questions]


def _fits(form: str | PromptFormat, row: Row) -> bool:
    """Whether the row has the columns of a prompt in the recipe's format; `auto` finds out by itself."""
    if isinstance(form, PromptFormat):
        needed = {column for _, column in columns.parse(form.prompt, "prompt") if column is not None}
    else:
        named = {"messages": "messages", "sharegpt": "conversations", "alpaca": "instruction"}
        needed = {named[form]} if form in named else set[str]()
    return form != "text" and needed <= row.values.keys()


def _is_bare(template: str) -> bool:
    """Whether a prompt is nothing but one column."""
    return [text for text, _ in columns.parse(template, "prompt")] == [""]


def _not_empty(ids: Ids, where: str) -> Ids:
    if not ids:
        raise UserError("the prompt is empty", where=where, fix="write something", code=ExitCode.DATA)
    return ids


def _names(opened: Opened, wanted: Generation) -> Iterable[str]:
    """Who answers."""
    if not opened.adapters:
        return ("base",)
    return ("base", "adapter") if wanted.compare else ("adapter",)


def _answers(name: str, opened: Opened, asked: list[Asked], wanted: Generation, screen: Screen) -> list[str]:
    opened.use(None if name == "base" else next(iter(opened.adapters)))
    chosen = opened.recipe.eval if opened.recipe else EvalRecipe()
    with screen.counting(f"{name} answers", len(asked)) as counter:
        return generation.answers(
            opened.language.model,
            opened.language.tokenizer,
            [each.ids for each in asked],
            max_new_tokens=_longest(opened, wanted),
            batch_size=chosen.batch_size,
            temperature=wanted.temperature,
            seed=wanted.seed,
            advance=counter.advance,
        )


def _stream(opened: Opened, asked: Asked, wanted: Generation) -> None:
    for piece in generation.stream(
        opened.language.model,
        opened.language.tokenizer,
        asked.ids,
        max_new_tokens=_longest(opened, wanted),
        temperature=wanted.temperature,
        seed=wanted.seed,
    ):
        print(piece, end="", flush=True)
    print()


def _longest(opened: Opened, wanted: Generation) -> int:
    chosen = opened.recipe.eval if opened.recipe else EvalRecipe()
    return wanted.max_new_tokens or chosen.max_new_tokens


def _json(asked: Asked, answers: dict[str, str]) -> str:
    given: dict[str, Any] = {"prompt": asked.text, "where": asked.where, "expected": asked.expected}
    return json.dumps({key: value for key, value in given.items() if value} | answers, ensure_ascii=False)


def _readable(asked: Asked, answers: dict[str, str], alone: bool) -> str:
    """The bare answer, or everything under its name."""
    if alone:
        return next(iter(answers.values()))
    named = {"prompt": asked.text, "expected": asked.expected, **answers}
    lines = [
        f"{name + ':':10}{text.strip()}" for name, text in named.items() if text.strip() or name in answers
    ]
    return "\n".join([*([f"── {asked.where}"] if asked.where else []), *lines, ""])
