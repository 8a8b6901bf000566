"""How the cost grows: with tokens, length of rows, rank, rows of data, adapters. Measured, and fitted to a line.

    .venv/bin/python scripts/bench/growth.py --model models/smollm2-135m-instruct

Everything runs in this one process, so that the points of a line are comparable. Nothing else may run. Numbers, fits
and picture go to scripts/bench/results/.
"""

import argparse
import io
import json
import random
import re
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from ours import Rows, recipe_of
from run import device
from system import SEED
from transformers import AutoTokenizer

from lora_cli import io_ops
from lora_cli import model as models
from lora_cli.adapter.inject import inject
from lora_cli.data import load
from lora_cli.data.load import Datasets
from lora_cli.recipe.schema import AdapterRecipe, DataRecipe
from lora_cli.run import prepare
from lora_cli.screen import Screen
from lora_cli.train.loop import train_steps

HERE = Path(__file__).parent
STEPS = 3
"""Of each point; the first is not timed."""
Point = tuple[float, float]


def step_seconds(model: str, rows: int, length: int, r: int = 16) -> float:
    """Median time of an optimizer step on `rows` rows of `length` tokens, every one learned."""
    recipe = recipe_of(model, rows, STEPS)
    recipe = recipe.model_copy(update={"adapter": AdapterRecipe(r=r)})
    accelerator = Accelerator()
    language = models.load(recipe.model, accelerator.device)
    chance = random.Random(SEED)
    ids = [[chance.randrange(1000, 40000) for _ in range(length)] for _ in range(rows * STEPS)]
    examples = Rows([{"input_ids": each, "trained": [1] * length} for each in ids], SEED)
    datasets = Datasets(cast(Any, examples), None, None, cast(Any, None))
    run = prepare.training(recipe, language, datasets, accelerator, Screen.silent())
    return median([report.seconds for report in train_steps(run)][1:])


def with_tokens(model: str) -> list[Point]:
    """Seconds a step against its tokens, in rows of 128."""
    return [(rows * 128, step_seconds(model, rows, 128)) for rows in (1, 2, 4, 8, 16)]


def with_length(model: str) -> list[Point]:
    """Milliseconds a token against the length of rows, 2,048 tokens a step."""
    lengths = (64, 256, 512, 1024, 2048)
    return [(each, step_seconds(model, 2048 // each, each) / 2.048) for each in lengths]


def with_rank(model: str) -> list[Point]:
    """Seconds a step of 512 tokens against r."""
    return [(r, step_seconds(model, 4, 128, r)) for r in (4, 16, 64, 128, 256)]


def with_rows(model: str) -> list[Point]:
    """Seconds to tokenise against the number of rows."""
    return [(count, tokenised(model, count)[0]) for count in (1_000, 4_000, 16_000, 64_000)]


def with_rows_again(model: str) -> list[Point]:
    """Seconds to find them tokenised against the number of rows."""
    return [(count, tokenised(model, count)[1]) for count in (1_000, 4_000, 16_000, 64_000)]


def tokenised(model: str, count: int) -> tuple[float, float]:
    """Seconds until `count` rows of some 30 tokens are ready: the first time, and the second."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for number in range(count):
                text = f"row {number} is about the number {number * 7 % 1000} and its neighbours"
                file.write(json.dumps({"prompt": text, "completion": f" {number}"}) + "\n")
        data = DataRecipe(train=cast(Any, str(path)))
        taken = []
        for _ in range(2):
            began = time.perf_counter()
            load.load(data, AutoTokenizer.from_pretrained(model), cache=Path(folder) / "cache", seed=SEED)
            taken.append(time.perf_counter() - began)
    return taken[0], taken[1]


def with_adapters(model: str) -> list[Point]:
    """Peak memory in MB against the adapters of r 16 on one base."""
    recipe = recipe_of(model, 1, 1)
    language = models.load(recipe.model)
    points: list[Point] = []
    for count in range(1, 9):
        adapter = inject(language.model, prepare.plan_for(recipe, language), SEED)
        adapter.deactivate()
        points.append((count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000))
        kept.append(adapter)
    return points


kept: list[Any] = []
"""Adapters, which would be gone otherwise."""
LAWS: dict[str, tuple[Callable[[str], list[Point]], str, str]] = {
    "adapters": (with_adapters, "adapters on one base", "peak memory, MB"),
    "tokens": (with_tokens, "tokens a step", "seconds a step"),
    "length": (with_length, "tokens a row", "ms a token"),
    "rank": (with_rank, "r", "seconds a step"),
    "rows": (with_rows, "rows", "seconds to tokenise"),
    "rows again": (with_rows_again, "rows", "seconds from the cache"),
}
"""Name -> how it is measured, what is varied, and what it costs. The first is measured in a small process."""


def fitted(points: Sequence[Point]) -> dict[str, float]:
    """The line through the points, and the share of their spread that it explains."""
    x, y = np.array(points).T
    slope, start = np.polyfit(x, y, 1)
    left, all_of = ((y - start - slope * x) ** 2).sum(), ((y - y.mean()) ** 2).sum()
    return {"start": float(start), "slope": float(slope), "explained": float(1 - left / all_of)}


def table(found: dict[str, Any]) -> str:
    """Markdown: a law a line."""
    lines = ["| how the cost grows | at first | for each | R² |", "|---|---|---|---|"]
    for name, law in found["laws"].items():
        _, varied, cost = LAWS[name]
        fit, span = law["fit"], f"{law['points'][0][0]:,} to {law['points'][-1][0]:,}"
        numbers = f"{fit['start']:.3g} | {fit['slope']:.3g} | {fit['explained']:.3f}"
        lines.append(f"| {cost}, by {varied}, {span} | {numbers} |")
    return "\n".join([*lines, "", f"{found['device']}; {found['model']}, {found['dtype']}.", ""])


def picture(found: dict[str, Any]) -> bytes:
    """A panel a law: the points, and the line through them."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    panels = figure.subplots(2, 3).flatten()
    for panel, (name, law) in zip(panels, found["laws"].items(), strict=True):
        _, varied, cost = LAWS[name]
        x, y = np.array(law["points"]).T
        panel.plot(x, law["fit"]["start"] + law["fit"]["slope"] * x, color="#b8c4d9", linewidth=1.8)
        panel.plot(x, y, "o", color="#2f5b9d", markersize=5)
        panel.set(xlabel=varied, ylabel=cost, ylim=(0, 1.15 * max(y)))
        panel.locator_params(axis="x", nbins=5)
        panel.grid(alpha=0.3)
    figure.suptitle(f"{found['device']}; {found['model']}, {found['dtype']}", fontsize=10)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def main() -> None:
    """Measure every law and write it down as it comes."""
    parser = argparse.ArgumentParser(description="how the cost grows")
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder")
    asked = parser.parse_args()
    dtype = models.stored_dtype(recipe_of(asked.model, 1, 1).model, torch.device("cpu"))
    found: dict[str, Any] = {"device": device(), "model": asked.model, "dtype": str(dtype)[6:], "laws": {}}
    path = asked.results / f"growth-{re.sub(r'[^a-z0-9]+', '-', device().lower()).strip('-')}.json"
    for name, (measure, _, _) in LAWS.items():
        points = measure(asked.model)
        found["laws"][name] = {"points": points, "fit": fitted(points)}
        print(name, points, fitted(points), flush=True)
        io_ops.write_json(path, found)
    kept.clear()
    io_ops.write_text(path.with_suffix(".md"), table(found))
    io_ops.write_bytes(path.with_suffix(".png"), picture(found))


if __name__ == "__main__":
    main()
