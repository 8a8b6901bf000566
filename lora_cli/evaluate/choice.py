"""Which of a few answers a model holds for the most probable: log p(answer | prompt), summed over its tokens."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lora_cli.adapter.reading import Reading, reading, rows_of
from lora_cli.data.tokens import Ids
from lora_cli.errors import ExitCode, UserError
from lora_cli.evaluate.length import check_length
from lora_cli.evaluate.mode import evaluating
from lora_cli.train.loss import head_sees

Input = tuple[Ids, int]
"""What the model reads, and from how many of its last positions an answer's tokens are predicted."""

MAX_CHOICES = 20


def distinct(answers: Iterable[str]) -> tuple[str, ...]:
    """The choices, when the recipe does not list them: all answers that occur, sorted.

    Raises:
        UserError: there is only one, or so many that they are hardly labels.
    """
    found = sorted(set(answers))
    if 2 <= len(found) <= MAX_CHOICES:
        return tuple(found)
    what = f"choice_accuracy picks from 2 to {MAX_CHOICES} answers; the rows have {len(found)} different ones"
    raise UserError(what, where="eval.choices", fix="list the choices there", code=ExitCode.DATA)


def log_probabilities(
    model: PreTrainedModel,
    prompts: Sequence[Ids],
    answers: Sequence[Sequence[Ids]],
    *,
    max_tokens: int,
    pad_id: int,
    advance: Callable[[int], None] = lambda count: None,
) -> list[tuple[float, ...]]:
    """For each prompt, log p of each of its answers, in nats.

    The model reads the prompt and all but the last token of the answer. Where that is the same for several answers,
    as it is for all answers of one token, it is computed once.

    Args:
        model: its mode is put back.
        prompts: ids, at least one each.
        answers: for each prompt the ids of its answers, at least one each, without an end token.
        max_tokens: most tokens in one forward pass, padding included; a longer input goes alone.
        pad_id: any id.
        advance: called with the number of answers that have just been scored.

    Raises:
        UserError: a log-probability is not a finite number, or an input is longer than the model can read.
    """
    for prompt, choices in zip(prompts, answers, strict=True):
        check_length(model, len(prompt), max(map(len, choices)), "choice_accuracy")
    asked = _by_input(prompts, answers)
    found = [[math.nan] * len(each) for each in answers]
    with evaluating(model):
        for inputs in _batches(asked, max_tokens):
            for key, log_p in zip(inputs, _predictions(model, inputs, pad_id), strict=True):
                for (row, index, _), score in zip(asked[key], _scores(log_p, asked[key]), strict=True):
                    found[row][index] = score
                advance(len(asked[key]))
    if not all(math.isfinite(score) for scores in found for score in scores):
        what = "a log-probability is not a finite number"
        raise UserError(
            what, where="choice_accuracy", fix="try model.dtype: float32", code=ExitCode.NON_FINITE
        )
    return [tuple(scores) for scores in found]


Asked = dict[Input, list[tuple[int, int, Ids]]]
"""Input -> (row, index of the answer, answer) of everyone who needs it."""


def _by_input(prompts: Sequence[Ids], answers: Sequence[Sequence[Ids]]) -> Asked:
    asked: Asked = {}
    for row, (prompt, choices) in enumerate(zip(prompts, answers, strict=True)):
        for index, answer in enumerate(choices):
            assert prompt, "nothing predicts the first token of a text"
            assert answer, "an answer has tokens"
            asked.setdefault((prompt + answer[:-1], len(answer)), []).append((row, index, answer))
    return asked


def _batches(inputs: Iterable[Input], max_tokens: int) -> Iterator[list[Input]]:
    """Longest first, so that a batch is as wide as its first row."""
    left = sorted(inputs, key=lambda each: -len(each[0]))
    while left:
        rows = max(max_tokens // len(left[0][0]), 1)
        yield left[:rows]
        left = left[rows:]


def _predictions(model: PreTrainedModel, inputs: list[Input], pad_id: int) -> tuple[Tensor, ...]:
    """For each input the log-probabilities [answer length, vocabulary] of the answer's tokens, float32."""
    width = len(inputs[0][0])
    input_ids = torch.tensor([[*ids, *[pad_id] * (width - len(ids))] for ids, _ in inputs])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in inputs])
    ends = [row * width + len(ids) for row, (ids, _) in enumerate(inputs)]
    lengths = [length for _, length in inputs]
    positions = [at for end, length in zip(ends, lengths, strict=True) for at in range(end - length, end)]
    prompts = torch.tensor([len(ids) - length + 1 for ids, length in inputs])

    def documents() -> Reading:
        return rows_of((torch.arange(width) < prompts[:, None]).to(model.device))

    with reading(model, documents), head_sees(model, torch.tensor(positions, device=model.device)):
        output = model(
            input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False
        )
    return output.logits.float().log_softmax(-1).split(lengths)


def _scores(log_p: Tensor, wanted: list[tuple[int, int, Ids]]) -> list[float]:
    """The sum over each answer's tokens."""
    ids = torch.tensor([answer for _, _, answer in wanted], device=log_p.device)
    return log_p.gather(1, ids.t()).sum(0, dtype=torch.float64).tolist()
