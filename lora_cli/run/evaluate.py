"""`lora eval`: the base and the adapter, measured on the same held-out rows."""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from lora_cli import io_ops
from lora_cli.adapter.inject import without_adapters
from lora_cli.data import format as formats
from lora_cli.data.example import Example
from lora_cli.data.format import Format, Question
from lora_cli.data.load import Datasets, held_out_rows, load_examples
from lora_cli.data.source import Row
from lora_cli.errors import ExitCode, UserError
from lora_cli.evaluate import general, measure
from lora_cli.evaluate.measure import HeldOut, Measured
from lora_cli.model import LanguageModel, max_positions
from lora_cli.recipe.load import load
from lora_cli.recipe.schema import EvalRecipe, Recipe
from lora_cli.run import prepare
from lora_cli.run.open import Opened, adapter_folder, best_device, open_model, trained_with
from lora_cli.screen import Screen
from lora_cli.train.gradient import token_budget

PREDICTIONS = "predictions.jsonl"
LABELS = {
    "loss": "loss, nats per trained token",
    "perplexity": "perplexity per trained token",
    "choice_accuracy": "accuracy of the most probable choice",
    "exact_match": "exact match",
    "bleu": "BLEU",
    "chrf": "chrF",
    measure.GENERAL: "forgetting: loss on general text",
}


def evaluate(
    path: Path,
    recipe_path: Path | None,
    overrides: Sequence[str],
    screen: Screen,
    *,
    base: str | None = None,
    output: Path | None = None,
    adapter_only: bool = False,
) -> dict[str, Any]:
    """Measure what the recipe's `eval` names; show it, write predictions.jsonl, return it as one JSON object.

    Args:
        path: adapter folder, run folder, or model.
        recipe_path: what to measure, on which rows; default: the recipe that the adapter was trained with.
        overrides: `key=value` on top of the recipe.
        screen: where the table is shown.
        base: use this model instead of the one the adapter names.
        output: file for the predictions; default: predictions.jsonl in the run folder.
        adapter_only: leave the base out, because it is known.

    Raises:
        UserError: anything the user can mend.
    """
    recipe = _recipe(path, recipe_path, overrides)
    device = best_device()
    kept = prepare.model_of(recipe)
    opened = open_model(
        [path], base=base, dtype=kept.dtype, device=device, quantize=kept.quantize, bits=kept.bits
    )
    with tempfile.TemporaryDirectory() as scratch:
        rows = _held_out(recipe, opened, prepare.cache_folder(_run_folder(path) or Path(scratch)))
        measured = {
            name: measure.measure(opened.language, rows, token_budget(device), screen.counting)
            for name in _one_by_one(opened, adapter_only)
        }
        target = _predictions_file(path, output)
        report = _report(path, recipe, rows, measured, target)
        _show(report, measured, screen)
        if target is not None:
            io_ops.write_text(target, "".join(_lines(rows, measured)))
            screen.note(f"every row: {target}")
    return report


def _recipe(path: Path, recipe_path: Path | None, overrides: Sequence[str]) -> Recipe:
    """The recipe that says what to measure."""
    if recipe_path is not None:
        return load(recipe_path, overrides).recipe
    folder = adapter_folder(path)
    trained = folder and trained_with(folder, overrides)
    if trained:
        return trained
    if not path.exists():
        raise UserError("there is no such folder", where=str(path), code=ExitCode.MODEL)
    what = "nothing here says what to measure, on which rows"
    raise UserError(what, where=str(path), fix="give a recipe with --recipe")


def _held_out(recipe: Recipe, opened: Opened, cache: Path) -> HeldOut:
    """The held-out rows as questions, and tokenised where a loss is wanted."""
    data, seed = recipe.data, recipe.train.seed
    if data.eval is None and data.eval_fraction == 0:
        what = "the recipe names no held-out rows"
        raise UserError(what, where="data.eval", fix="--set data.eval=FILE")
    rows = list(islice(held_out_rows(data, seed), recipe.eval.max_rows))
    if not rows:
        what = "no row is held out: there are too few"
        raise UserError(what, where="data.eval_fraction", fix="hold out a larger share", code=ExitCode.DATA)
    language = opened.language
    form = formats.make(data, language.tokenizer, rows[0].values, references=recipe.eval.references)
    examples = None
    if measure.LOSSES & set(recipe.eval.metrics):
        examples = load_examples(data, form, "eval", cache=cache, seed=seed)
        prepare.check_fit(language.model, Datasets(examples, None, None, form))
    questions = [_question(form, row) for row in rows]
    return measure.held_out(recipe.eval, questions, form, examples, _general(recipe.eval, language))


def _general(wanted: EvalRecipe, language: LanguageModel) -> Sequence[Example]:
    """The text on which forgetting shows, if there is one."""
    if wanted.forgetting is None:
        return ()
    positions = max_positions(language.model)
    return general.pieces(wanted.forgetting, language.tokenizer, positions, wanted.max_rows)


def _question(form: Format, row: Row) -> Question:
    """Texts ask nothing, but have a loss."""
    return Question((), "", "", (), row.where) if form.documents else form.question(row)


def _one_by_one(opened: Opened, adapter_only: bool) -> Iterator[str]:
    """Name what is measured next, the model being in that state while the caller works."""
    if not (adapter_only and opened.adapters):
        with without_adapters(*opened.adapters.values()):
            yield "base"
    if opened.adapters:
        yield "adapter"


def _run_folder(path: Path) -> Path | None:
    """The run that an adapter belongs to."""
    folder = adapter_folder(path)
    in_run = folder is not None and folder.name == "adapter" and (folder.parent / "recipe.yaml").is_file()
    return folder.parent if folder and in_run else None


def _predictions_file(path: Path, output: Path | None) -> Path | None:
    """Where the predictions go; a plain model's folder is not ours to write in."""
    if output is not None:
        return output / PREDICTIONS if output.is_dir() else output
    folder = _run_folder(path) or adapter_folder(path)
    return folder and folder / PREDICTIONS


def _report(
    path: Path, recipe: Recipe, rows: HeldOut, measured: Mapping[str, Measured], target: Path | None
) -> dict[str, Any]:
    """The result as one JSON object."""
    any_of_them = next(iter(measured.values()))
    loss, text = any_of_them.loss, any_of_them.general
    return {
        "path": str(path),
        "data": [source.path for source in recipe.data.eval or recipe.data.train],
        "rows": len(rows.questions),
        "trained_tokens": loss and loss.trained_tokens,
        "general_tokens": text and text.trained_tokens,
        "choices": list(rows.choices) or None,
        **{name: measure.numbers(rows, each) for name, each in measured.items()},
        "forgetting": _forgetting(measured),
        "predictions": target and str(target),
    }


def _forgetting(measured: Mapping[str, Measured]) -> float | None:
    """By how much the adapter's loss on the general text is above the base's, nats per token."""
    base, adapter = (measured[name].general if name in measured else None for name in ("base", "adapter"))
    return adapter.loss - base.loss if base and adapter else None


def _show(report: Mapping[str, Any], measured: Mapping[str, Measured], screen: Screen) -> None:
    """The table, and on what it rests."""
    first = report[next(iter(measured))]
    names = [metric for metric in LABELS if metric in first]
    screen.table(
        ["", *measured],
        [[LABELS[name], *(_cell(report[column], name) for column in measured)] for name in names],
    )
    screen.note(f"on {report['rows']:,} rows of {', '.join(report['data'])}")
    if report["trained_tokens"]:
        screen.note(f"loss over {report['trained_tokens']:,} trained tokens")
    if report["general_tokens"]:
        lost = f": {report['forgetting']:+.4f}" if report["forgetting"] is not None else ""
        screen.note(f"forgetting over {report['general_tokens']:,} tokens of general text{lost}")
    if report["choices"]:
        screen.note(f"choices: {', '.join(map(repr, report['choices']))}")
    if any(key.endswith("_interval") for key in first):
        what = f"in brackets: 95 % intervals; {report['rows']:,} rows tell shares apart no better than that"
        screen.note(what)


def _cell(numbers: Mapping[str, Any], name: str) -> str:
    if f"{name}_interval" in numbers:
        low, high = numbers[f"{name}_interval"]
        return f"{numbers[name]:.1%} ({low:.1%} to {high:.1%})"
    return f"{numbers[name]:.4f}" if name in (*measure.LOSSES, measure.GENERAL) else f"{numbers[name]:.1f}"


def _lines(rows: HeldOut, measured: Mapping[str, Measured]) -> Iterator[str]:
    """predictions.jsonl: a row each, everyone's answer beside the right one."""
    answers = {name: measure.by_row(rows, each) for name, each in measured.items()}
    for index, question in enumerate(rows.questions):
        line: dict[str, Any] = {
            "where": question.where,
            "prompt": question.prompt,
            "answer": question.answer,
            "references": list(question.references),
        }
        line |= {name: each[index] for name, each in answers.items()}
        yield json.dumps(line, ensure_ascii=False) + "\n"
