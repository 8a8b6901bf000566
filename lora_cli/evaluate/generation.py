"""Answers that a model writes itself: greedy, or drawn at a temperature, by transformers' `generate`.

Drawing uses the Gumbel trick: the largest of logits / T + Gumbel noise is a draw from softmax(logits / T). The noise
comes from a generator of its own per prompt, so an answer depends on the seed and on its prompt's place in the list,
not on the batch it is computed in, and PyTorch's random state is left alone.
"""

import hashlib
import itertools
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from lora_cli.adapter.reading import reading, rows_of
from lora_cli.data import template
from lora_cli.data.columns import conversation
from lora_cli.data.tokens import Ids, encode
from lora_cli.errors import UserError
from lora_cli.evaluate.length import check_length
from lora_cli.evaluate.mode import evaluating

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What decoding ends with when the last token is the first half of a character."""


def answers(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Ids],
    *,
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    seed: int = 0,
    advance: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """The model's answer to each prompt, in their order, without the token that ends it.

    Args:
        model: its mode and settings are put back.
        tokenizer: its tokenizer.
        prompts: ids, at least one each.
        max_new_tokens: longest answer.
        batch_size: prompts computed at once, those of similar length together.
        temperature: 0 takes the most probable token.
        seed: of the draws when the temperature is above 0.
        advance: called with the number of answers that have just been finished.

    Raises:
        UserError: prompt and answer together are longer than the model can read.
    """
    by_length = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    found: dict[int, str] = {}
    for start in range(0, len(prompts), batch_size):
        rows = by_length[start : start + batch_size]
        noise = _noise(temperature, seed, rows)
        written = _generate(model, tokenizer, [prompts[row] for row in rows], max_new_tokens, noise)
        found |= zip(rows, (_text(tokenizer, ids) for ids in written), strict=True)
        advance(len(rows))
    return [found[row] for row in range(len(prompts))]


def stream(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: Ids,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Generator[str]:
    """The same answer as `answers` gives to this prompt alone, piece by piece while it is written.

    Closing the generator stops the model; so does Ctrl-C, which then reaches the caller.
    """
    pieces = _Pieces(tokenizer, stop_ids(model, tokenizer))

    def write() -> None:
        try:
            _generate(model, tokenizer, [prompt], max_new_tokens, _noise(temperature, seed, [0]), pieces)
        except BaseException as error:  # whoever reads the pieces has to hear of it
            pieces.queue.put(error)
        pieces.queue.put(None)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        for piece in iter(pieces.queue.get, None):
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        pieces.stopped = True
        thread.join()


def stop_ids(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's, the model's settings', the chat template's end of turn."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    several = configured if isinstance(configured, list) else [configured]
    found = [tokenizer.eos_token_id, *several, _end_of_turn(tokenizer)]
    return list(dict.fromkeys(token for token in found if token is not None))


def _end_of_turn(tokenizer: Any) -> int | None:
    """The first special token that the template writes behind an answer; None where it writes none."""
    if tokenizer.chat_template is None:
        return None
    asked, answered = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    try:
        end = template.turn(tokenizer, conversation(asked, answered), 1, "").end
    except UserError:  # a template for conversations of another kind, with tools or a system message, say
        return None
    return next(iter(encode(tokenizer, end)[0]), None)


def _generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Ids],
    max_new_tokens: int,
    noise: LogitsProcessorList,
    pieces: "_Pieces | None" = None,
) -> list[Ids]:
    """Ids of the answers to a batch of prompts, up to the first token that ends them."""
    width = max(map(len, prompts))
    check_length(model, width, max_new_tokens, "max_new_tokens")
    stop = stop_ids(model, tokenizer)
    # Padded on the left, so that every answer begins in the same column; any id will do, the mask hides it.
    input_ids = torch.tensor([[stop[0]] * (width - len(ids)) + list(ids) for ids in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop,
        pad_token_id=stop[0],
        use_cache=True,
    )
    generate: Any = model.generate
    of_prompts = mask.to(model.device).bool()
    with evaluating(model), _plain_settings(model), reading(model, lambda: rows_of(of_prompts, goes_on=True)):
        output: Any = generate(
            input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=settings,
            logits_processor=noise,
            streamer=pieces,
        )
    return [_up_to_end(ids, stop) for ids in output[:, width:].tolist()]


def _up_to_end(ids: list[int], stop: Sequence[int]) -> Ids:
    return tuple(itertools.takewhile(lambda token: token not in stop, ids))


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)


@contextmanager
def _plain_settings(model: PreTrainedModel) -> Generator[None]:
    """Without the model's own settings, such as a penalty on repetitions, which `generate` would fill in."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _noise(temperature: float, seed: int, rows: Sequence[int]) -> LogitsProcessorList:
    return LogitsProcessorList([_Gumbel(temperature, seed, rows)] if temperature > 0 else [])


class _Gumbel(LogitsProcessor):
    """logits / T + Gumbel noise, whose largest is a draw from softmax(logits / T) (Gumbel 1954)."""

    def __init__(self, temperature: float, seed: int, rows: Sequence[int]) -> None:
        """One generator per prompt, by seed and place; on the CPU, so that every device draws the same."""
        self.temperature = temperature
        self.generators = [torch.Generator().manual_seed(_seed(seed, row)) for row in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [rows, vocabulary] of the next token."""
        exponential = torch.stack(
            [torch.empty(scores.shape[1]).exponential_(generator=each) for each in self.generators]
        )
        return scores / self.temperature - exponential.log().to(scores.device)


def _seed(*numbers: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "big")


class _Pieces(BaseStreamer):
    """Puts each new piece of text into a queue as soon as its characters are whole."""

    def __init__(self, tokenizer: Any, stop: Sequence[int]) -> None:
        """Nothing is written yet."""
        self.tokenizer, self.stop_ids = tokenizer, stop
        self.queue: SimpleQueue[str | BaseException | None] = SimpleQueue()
        self.ids: list[int] | None = None
        self.shown = 0
        self.stopped = False

    def put(self, value: Tensor) -> None:
        """The prompt [1, length] first, which is not shown, then one new token [1] after the other.

        Raises:
            InterruptedError: nobody reads any more; it ends `generate`.
        """
        if self.stopped:
            raise InterruptedError
        if self.ids is None:
            self.ids = []
            return
        self.ids += value.tolist()
        text = _text(self.tokenizer, _up_to_end(self.ids, self.stop_ids))
        if not text.endswith(UNFINISHED):
            self._show(text)

    def end(self) -> None:
        """Show what was held back."""
        self._show(_text(self.tokenizer, _up_to_end(self.ids or [], self.stop_ids)))

    def _show(self, text: str) -> None:
        if len(text) > self.shown:
            self.queue.put(text[self.shown :])
            self.shown = len(text)
