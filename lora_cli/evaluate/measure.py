"""Held-out rows × one model -> what it did with each of them, and the numbers that sum it up."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from lora_cli.data.cache import Examples
from lora_cli.data.example import Example
from lora_cli.data.format import Format, Question
from lora_cli.data.pack import Documents
from lora_cli.data.tokens import Ids
from lora_cli.errors import ExitCode, UserError
from lora_cli.evaluate import choice, generation, metrics
from lora_cli.evaluate.length import check_length
from lora_cli.evaluate.loss import HeldOutLoss, held_out_loss
from lora_cli.model import LanguageModel
from lora_cli.recipe.schema import EvalRecipe

LOSSES = {"loss", "perplexity"}
GENERAL = "general_loss"
"""Loss on the text of `eval.forgetting`."""
WRITTEN = {"exact_match", "bleu", "chrf"}
"""Metrics of answers that the model writes itself."""

Counting = Callable[[str, int], AbstractContextManager[Any]]
"""Shows progress: (what, how many) -> something with `advance(count)`."""


@dataclass(frozen=True)
class HeldOut:
    """The rows, and what is measured on them."""

    wanted: EvalRecipe
    questions: Sequence[Question]
    examples: Examples | None
    """Of the same rows; None when no loss is wanted."""
    general: Sequence[Example] = ()
    """Of a general text, to see what is forgotten."""
    choices: tuple[str, ...] = ()
    candidates: Sequence[tuple[Ids, ...]] = ()
    """For each question the ids of the choices."""


@dataclass(frozen=True)
class Measured:
    """What one model did with the rows; None where it was not asked."""

    loss: HeldOutLoss | None
    scores: list[tuple[float, ...]] | None
    """For each row the log-probability of each choice."""
    texts: list[str] | None
    """For each row what the model wrote."""
    general: HeldOutLoss | None
    """On the general text."""


def held_out(
    wanted: EvalRecipe,
    questions: Sequence[Question],
    form: Format,
    examples: Examples | None,
    general: Sequence[Example] = (),
) -> HeldOut:
    """Check that the rows can be measured as wanted, and find the choices.

    Raises:
        UserError: sacrebleu is missing, or a row asks nothing, has no right answer, or one that is no choice.
    """
    if {"bleu", "chrf"} & set(wanted.metrics):
        metrics.sacrebleu()
    if not set(wanted.metrics) <= LOSSES:
        _check_answered(questions)
    if "choice_accuracy" not in wanted.metrics:
        return HeldOut(wanted, questions, examples, general)
    choices = wanted.choices or choice.distinct(question.answer for question in questions)
    _check_choices(questions, choices)
    candidates = [tuple(form.encode_answer(each, text) for text in choices) for each in questions]
    return HeldOut(wanted, questions, examples, general, choices, candidates)


def measure(language: LanguageModel, rows: HeldOut, max_tokens: int, counting: Counting) -> Measured:
    """Let the model, as it is now, answer the rows.

    Args:
        language: the base, or the base with an adapter active.
        rows: what to measure.
        max_tokens: most tokens in one forward pass.
        counting: shows progress.

    Raises:
        UserError: a loss or a log-probability is not a finite number, or a row is too long for the model.
    """
    names = set(rows.wanted.metrics)
    if names & WRITTEN:  # before the other metrics take their time
        longest = max(len(question.prompt_ids) for question in rows.questions)
        check_length(language.model, longest, rows.wanted.max_new_tokens, "eval.max_new_tokens")
    return Measured(
        _loss(language, rows.examples, max_tokens, rows.wanted.max_rows) if names & LOSSES else None,
        _scores(language, rows, max_tokens, counting) if "choice_accuracy" in names else None,
        _texts(language, rows, counting) if names & WRITTEN else None,
        _loss(language, rows.general, max_tokens) if rows.general else None,
    )


def numbers(rows: HeldOut, measured: Measured) -> dict[str, Any]:
    """Metric -> number; `<metric>_interval` is the 95 % interval of a share."""
    found: dict[str, Any] = {}
    references = [question.references for question in rows.questions]
    for name in rows.wanted.metrics:
        if measured.loss is not None and name in LOSSES:
            found[name] = getattr(measured.loss, name)
        elif measured.scores is not None and name == "choice_accuracy":
            found |= _share(name, _picked_right(rows, measured.scores))
        elif measured.texts is not None and name == "exact_match":
            found |= _share(name, list(map(metrics.exact_match, measured.texts, references)))
        elif measured.texts is not None:
            found[name] = {"bleu": metrics.bleu, "chrf": metrics.chrf}[name](measured.texts, references)
    if measured.general is not None:
        found[GENERAL] = measured.general.loss
    return found


def by_row(rows: HeldOut, measured: Measured) -> list[dict[str, Any]]:
    """For each row what the model did with it."""
    found: list[dict[str, Any]] = [{} for _ in rows.questions]
    if measured.loss is not None and rows.examples is not None:
        losses = _losses(rows.examples, measured.loss)
        for line, question in zip(found, rows.questions, strict=True):
            line["loss"] = losses.get(question.where)
    if measured.scores is not None:
        right = _picked_right(rows, measured.scores)
        for line, scores, is_right in zip(found, measured.scores, right, strict=True):
            line |= {"choice": _picked(rows, scores), "right": is_right}
            line["log_probabilities"] = dict(zip(rows.choices, scores, strict=True))
    if measured.texts is not None:
        for line, text, question in zip(found, measured.texts, rows.questions, strict=True):
            line |= {"text": text, "exact_match": metrics.exact_match(text, question.references)}
    return found


def _loss(
    language: LanguageModel, examples: Documents | None, max_tokens: int, rows: int | None = None
) -> HeldOutLoss:
    model = language.model
    assert examples is not None, "a loss is wanted, so the examples are there"
    return held_out_loss(
        model, examples, device=model.device, max_tokens=max_tokens, pad_id=language.pad_id, rows=rows
    )


def _scores(
    language: LanguageModel, rows: HeldOut, max_tokens: int, counting: Counting
) -> list[tuple[float, ...]]:
    with counting("scoring choices", len(rows.questions) * len(rows.choices)) as counter:
        return choice.log_probabilities(
            language.model,
            [question.prompt_ids for question in rows.questions],
            rows.candidates,
            max_tokens=max_tokens,
            pad_id=language.pad_id,
            advance=counter.advance,
        )


def _texts(language: LanguageModel, rows: HeldOut, counting: Counting) -> list[str]:
    with counting("writing answers", len(rows.questions)) as counter:
        return generation.answers(
            language.model,
            language.tokenizer,
            [question.prompt_ids for question in rows.questions],
            max_new_tokens=rows.wanted.max_new_tokens,
            batch_size=rows.wanted.batch_size,
            advance=counter.advance,
        )


def _picked(rows: HeldOut, scores: tuple[float, ...]) -> str:
    """The most probable choice; of equal ones the first."""
    return rows.choices[scores.index(max(scores))]


def _picked_right(rows: HeldOut, scores: list[tuple[float, ...]]) -> list[bool]:
    return [_picked(rows, each) in q.references for each, q in zip(scores, rows.questions, strict=True)]


def _share(name: str, right: list[bool]) -> dict[str, Any]:
    return {
        name: sum(right) / len(right),
        f"{name}_interval": list(metrics.wilson(sum(right), len(right))),
    }


def _losses(examples: Examples, loss: HeldOutLoss) -> dict[str, float]:
    """Where a row stands -> its loss per trained token; a row can have several examples."""
    sums: defaultdict[str, float] = defaultdict(float)
    tokens: defaultdict[str, int] = defaultdict(int)
    for index, nats in enumerate(loss.sums):
        sums[examples.where(index)] += nats
        tokens[examples.where(index)] += int(examples.trained_counts[index])
    return {where: nats / tokens[where] for where, nats in sums.items()}


def _check_answered(questions: Iterable[Question]) -> None:
    for question in questions:
        if not question.prompt_ids:
            what = "nothing is asked here: the prompt is empty"
            raise UserError(what, where=question.where, fix=_LOSS_ONLY, code=ExitCode.DATA)
        if not question.references:
            what = "the row has no right answer to compare with"
            raise UserError(what, where=question.where, fix=_LOSS_ONLY, code=ExitCode.DATA)


_LOSS_ONLY = "mend the row, or measure the loss only: --set eval.metrics=[loss]"


def _check_choices(questions: Iterable[Question], choices: tuple[str, ...]) -> None:
    for question in questions:
        if not set(question.references) & set(choices):
            what = f"the right answer {question.answer!r} is not among the choices {', '.join(map(repr, choices))}"
            fix = (
                "choices are written as they stand behind the prompt, with the space in front if there is one"
            )
            raise UserError(what, where=question.where, fix=f"eval.choices: {fix}", code=ExitCode.DATA)
