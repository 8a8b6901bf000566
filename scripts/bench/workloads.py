"""The workloads of the speed benchmark: which rows every system trains on. `write` makes them once, as token ids.

A workload is a line in a table: other ones, for other devices, are another table.
"""

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

from system import SEED, in_steps

from lora_cli.data.load import load_format
from lora_cli.data.source import read_rows
from lora_cli.recipe.schema import DataRecipe, PromptFormat

Row = dict[str, list[int]]
"""`input_ids`, and `trained`: 1 for each of them that is learned, else 0."""


@dataclass(frozen=True)
class Sources:
    """Where text comes from."""

    tokenizer: Any
    e2e: Path
    """Rows {"mr": ..., "text": ...}."""
    texts: tuple[Path, ...]
    """Files with plain text or with rows {"text": ...}, read one behind the other."""


@dataclass(frozen=True)
class Workload:
    """Rows of one kind, and how many steps of them a process trains."""

    name: str
    title: str
    rows: Callable[[Sources, int, random.Random], list[Row]]
    """Makes so many rows."""
    batch_size: int
    warmup: int
    timed: int
    tuned: dict[str, object] = field(default_factory=dict)
    """What an expert sets for these rows in the tuned peer."""

    @property
    def steps(self) -> int:
        """Of a process."""
        return self.warmup + self.timed


def write(workload: Workload, sources: Sources, path: Path) -> list[Row]:
    """Write one row a line; the same file for the same sources.

    The rows of the warm-up and the timed ones are drawn apart, so that the timed ones are a fair sample.
    """
    rng = random.Random(f"{SEED} {workload.name}")
    counts = (workload.warmup * workload.batch_size, workload.timed * workload.batch_size)
    rows = [row for count in counts if count for row in workload.rows(sources, count, rng)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def facts(rows: list[Row], batch_size: int) -> dict[str, float]:
    """What has to be known of the rows to read the speed.

    Returns:
        tokens_per_step; padding: cells of batches padded to their longest row, over tokens; labelled: share of the
        tokens; attended: mean over tokens of the length of their row, which is what attention's cost goes by.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    tokens = sum(lengths)
    steps = [[len(row["input_ids"]) for row in step] for step in in_steps(rows, batch_size)]
    return {
        "tokens_per_step": tokens / len(steps),
        "padding": sum(max(step) * len(step) for step in steps) / tokens,
        "labelled": sum(sum(row["trained"][1:]) for row in rows) / tokens,
        "attended": sum(length**2 for length in lengths) / tokens,
        "longest": max(lengths),
    }


# Rows


def chat(sources: Sources, count: int, rng: random.Random) -> list[Row]:
    """E2E in the model's chat template, only the answer learned: the data section of recipes/e2e.yaml."""
    data = DataRecipe(
        train=str(sources.e2e),  # pyright: ignore[reportArgumentType]
        format=PromptFormat(prompt="{mr}", completion="{text}"),
        max_length=256,
    )
    form = load_format(data, sources.tokenizer)
    found = [row for _, row in read_rows(data.train, "train")]
    examples = [example for row in rng.sample(found, count) for example in form.examples(row)]
    return [_row(list(example.input_ids), list(example.trained)) for example in examples]


def uniform(sources: Sources, count: int, rng: random.Random) -> list[Row]:
    """512 tokens, every one learned."""
    return _cut(sources, [512] * count, lambda length: 0, rng)


def heavy_tailed(sources: Sources, count: int, rng: random.Random) -> list[Row]:
    """Median 110 tokens, 1300 at most; the first third, at most 60 tokens, is the prompt."""
    return _cut(sources, lognormal(count, 110, 1.0, 1300), lambda length: min(length // 3, 60), rng)


def long_prompt(sources: Sources, count: int, rng: random.Random) -> list[Row]:
    """Around 440 tokens, the last tenth learned."""
    lengths = [round(400 + 80 * (i + 0.5) / count) for i in range(count)]
    return _cut(sources, lengths, lambda length: length - round(length / 10), rng)


def lognormal(count: int, median: float, spread: float, longest: int) -> list[int]:
    """Lengths at evenly spaced quantiles: a small sample has the tail that a large one has."""
    normal = NormalDist(math.log(median), spread)
    return [min(round(math.exp(normal.inv_cdf((i + 0.5) / count))), longest) for i in range(count)]


def _cut(sources: Sources, lengths: list[int], prompt: Callable[[int], int], rng: random.Random) -> list[Row]:
    """Rows of these lengths in random order, each a stretch of the text from somewhere."""
    ids = _tokens(sources)
    rng.shuffle(lengths)
    starts = [rng.randrange(len(ids) - length) for length in lengths]
    return [
        _row(ids[at : at + length], [i >= prompt(length) for i in range(length)])
        for at, length in zip(starts, lengths, strict=True)
    ]


def _tokens(sources: Sources) -> list[int]:
    texts = [_text(path) for path in sources.texts]
    return sources.tokenizer("\n".join(texts), add_special_tokens=False)["input_ids"]


def _text(path: Path) -> str:
    content = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return "\n".join(json.loads(line)["text"] for line in content.splitlines())
    return content


def _row(ids: list[int], trained: list[bool]) -> Row:
    return {"input_ids": ids, "trained": [int(each) for each in trained]}


def rows_at_once(count: int, of: int) -> dict[str, object]:
    """SFTConfig of a step of `of` rows, `count` at once."""
    return {"per_device_train_batch_size": count, "gradient_accumulation_steps": of // count}


# How many rows the tuned peer takes at once was tried with one thread on C1 and C3, in tokens per second of CPU time:
# C1: 8 rows 71, 8 without padding 74, 4 rows 85, 2 rows 90. C3: 8 without padding 42, 2 rows 51, 1 row 79.
# With fewer rows there are far fewer page faults (C1: 636,000 a step with 8 rows,
# 192,000 with 2). C2 and C4 follow C3, untried.
CPU = (
    Workload("C1", "chat, answers learned", chat, 8, warmup=1, timed=3, tuned=rows_at_once(2, 8)),
    Workload("C2", "512 tokens, all learned", uniform, 4, warmup=1, timed=1, tuned=rows_at_once(1, 4)),
    Workload("C3", "heavy-tailed lengths", heavy_tailed, 8, warmup=1, timed=2, tuned=rows_at_once(1, 8)),
    Workload(
        "C4", "long prompt, a tenth learned", long_prompt, 4, warmup=1, timed=1, tuned=rows_at_once(1, 4)
    ),
)
PARITY = Workload("parity", "chat, answers learned", chat, batch_size=8, warmup=0, timed=50)
"""Not timed: its losses are compared."""
