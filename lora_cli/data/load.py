"""Recipe.data -> the examples to learn from, the held-out ones, and how a row becomes ids."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from math import ceil
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from lora_cli import io_ops
from lora_cli.data import cache as examples_on_disk
from lora_cli.data import format as formats
from lora_cli.data.cache import Examples
from lora_cli.data.format import Format
from lora_cli.data.row import Row, wrong
from lora_cli.data.source import fingerprint, read_rows, snapshot
from lora_cli.errors import UserError
from lora_cli.recipe.schema import DataRecipe, WeightedSource

Split = Literal["train", "eval"]


@dataclass(frozen=True)
class Datasets:
    """What a run learns from and what it is measured on."""

    train: Examples
    eval: Examples | None
    """None without data.eval and data.eval_fraction."""
    eval_rows: Callable[[], Iterator[Row]] | None
    """The held-out rows as they stand in their source, read anew in each call."""
    format: Format


def load(
    data: DataRecipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    cache: Path,
    seed: int,
    references: str | None = None,
) -> Datasets:
    """Tokenise the rows of a recipe, or find them tokenised in the folder `cache`.

    Args:
        data: the recipe's `data`.
        tokenizer: the model's; gets the recipe's chat template where that is a file.
        cache: folder for tokenised examples, one folder in it for each way of making them.
        seed: decides which rows `eval_fraction` holds out.
        references: column that holds all right answers, see `eval.references`.

    Raises:
        UserError: a source or a row is wrong, or nothing is left to learn from.
    """
    form = load_format(data, tokenizer, references)
    train = load_examples(data, form, "train", cache=cache, seed=seed)
    if data.eval is None and data.eval_fraction == 0:
        return Datasets(train, None, None, form)
    held_out = load_examples(data, form, "eval", cache=cache, seed=seed)
    return Datasets(train, held_out, partial(held_out_rows, data, seed), form)


def load_format(
    data: DataRecipe, tokenizer: PreTrainedTokenizerBase, references: str | None = None
) -> Format:
    """The format of the recipe, told from the first training row where it is `auto`."""
    _, first = next(read_rows(data.train, "train"))
    return formats.make(data, tokenizer, first.values, references=references)


def load_examples(data: DataRecipe, form: Format, split: Split, *, cache: Path, seed: int) -> Examples:
    """The examples of one split; tokenises only what is not in the cache yet."""
    origin = _origin(data, split)
    before = snapshot(*origin)
    folder = cache / examples_on_disk.key(
        form.tokenizer,
        fingerprint(*origin),
        data.model_dump(mode="json", exclude={"train", "eval", "packing"}),
        [split, seed if data.eval_fraction else None, form.references],
    )
    if not examples_on_disk.is_complete(folder):
        try:
            _build(data, form, split, folder, seed)
        finally:  # what is wrong in a file that somebody is writing is not wrong in the file he wrote
            if _changed(origin, before):
                if folder.exists():
                    io_ops.remove(folder)
                what = "the data changed while it was read"
                raise wrong(what, f"data.{split}", "run the same command again")
    return Examples(folder, tuple(source.weight for source in origin[0]))


def _changed(origin: tuple[tuple[WeightedSource, ...], Split], before: list[tuple[str, int, int]]) -> bool:
    try:
        return snapshot(*origin) != before
    except UserError:  # it is gone
        return True


def held_out_rows(data: DataRecipe, seed: int) -> Iterator[Row]:
    """The held-out rows as they stand in their source."""
    return (row for _, row in _rows(data, "eval", seed))


def _build(data: DataRecipe, form: Format, split: Split, folder: Path, seed: int) -> None:
    if folder.exists():  # damaged, or it would not be built again
        io_ops.remove(folder)
    rows = _rows(data, split, seed)
    try:
        examples_on_disk.build(rows, form, folder, max_length=data.max_length, overflow=data.overflow)
    except UserError:
        if not examples_on_disk.is_complete(folder):  # else another process made the same one meanwhile
            raise


def _origin(data: DataRecipe, split: Split) -> tuple[tuple[WeightedSource, ...], Split]:
    """Where the rows of a split are read, and as what."""
    return (data.eval, "eval") if split == "eval" and data.eval is not None else (data.train, "train")


def _rows(data: DataRecipe, split: Split, seed: int) -> Iterator[tuple[int, Row]]:
    for number, found in enumerate(read_rows(*_origin(data, split))):
        if data.eval_fraction == 0 or is_held_out(number, data.eval_fraction, seed) == (split == "eval"):
            yield found


def is_held_out(number: int, fraction: float, seed: int) -> bool:
    """Whether the row with this number (from 0) is held out: one, at random, of each 1/fraction rows in their order.

    Needs neither the number of rows nor a list of them, and holds out the stated share of any stretch.
    """
    share = Fraction(str(fraction))  # as it is written: 0.1 is no binary number
    block = int(number * share)
    return number == _drawn(block, ceil(block / share), ceil((block + 1) / share), seed)


@lru_cache(maxsize=1)
def _drawn(block: int, first: int, end: int, seed: int) -> int:
    return random.Random(f"{seed} {block}").randrange(first, end)
