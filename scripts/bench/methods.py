"""What a step of a method costs beside one of plain LoRA: both adapt the same base in one process, and take turns.

    .venv/bin/python scripts/bench/methods.py --model models/smollm2-135m-instruct --methods dora

Rows like those of a chat: eight of 88 tokens, the last third learned. Nothing else may run. Ratios are made within a
turn; the first turns warm up. What is found is added to scripts/bench/results/methods-<device>.json.
"""

import argparse
import json
import random
import re
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from accelerate import Accelerator
from ours import Rows, recipe_of
from run import device
from system import SEED, R

from lora_cli import io_ops
from lora_cli import model as models
from lora_cli.data.load import Datasets
from lora_cli.model import LanguageModel
from lora_cli.recipe.schema import AdapterRecipe
from lora_cli.run import prepare
from lora_cli.screen import Screen
from lora_cli.train.loop import Training, train_steps

ROWS, LENGTH, LEARNED = 8, 88, 28
WARM_UP = 2
"""Turns that are not counted."""


def seconds(language: LanguageModel, methods: tuple[str, str], turns: int) -> list[tuple[float, float]]:
    """Of a step of the one and of the other method, turn by turn; who is first changes."""
    runs = [training(language, method, turns) for method in methods]
    steps = [train_steps(run) for run in runs]
    found = []
    for turn in range(turns):
        taken = {}
        for number in (0, 1) if turn % 2 else (1, 0):
            runs[number].adapter.activate()
            taken[number] = next(steps[number]).seconds
            runs[number].adapter.deactivate()
        found.append((taken[0], taken[1]))
    return found[WARM_UP:]


def training(language: LanguageModel, method: str, turns: int) -> Training:
    """A run about to take its first step, its adapter inactive."""
    recipe = recipe_of(language.model.name_or_path, ROWS, turns)
    recipe = recipe.model_copy(update={"adapter": AdapterRecipe(method=method, r=R)})
    chance = random.Random(SEED)
    trained = [0] * (LENGTH - LEARNED) + [1] * LEARNED
    ids = [[chance.randrange(1000, 40000) for _ in range(LENGTH)] for _ in range(ROWS * turns)]
    rows = Rows([{"input_ids": each, "trained": trained} for each in ids], SEED)
    datasets = Datasets(cast(Any, rows), None, None, cast(Any, None))
    run = prepare.training(recipe, language, datasets, Accelerator(), Screen.silent())
    run.adapter.deactivate()
    return run


def summary(ratios: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    ordered = sorted(ratios)
    quarter = len(ordered) // 4
    return {"median": median(ordered), "low": ordered[quarter], "high": ordered[-1 - quarter]}


def main() -> None:
    """Measure each method, LoRA beside itself first, and write it down as it comes."""
    parser = argparse.ArgumentParser(description="what a step of a method costs beside one of LoRA")
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--methods", default="dora")
    parser.add_argument("--turns", type=int, default=18)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder")
    asked = parser.parse_args()
    path = asked.results / f"methods-{re.sub(r'[^a-z0-9]+', '-', device().lower()).strip('-')}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for method in ("lora", *asked.methods.split(",")):
        language = models.load(recipe_of(asked.model, ROWS, 1).model, torch.device("cpu"))
        turns = seconds(language, (method, "lora"), asked.turns)
        of_type = found.setdefault(str(language.model.dtype).removeprefix("torch."), {})
        of_type[method] = {
            "over_lora": summary([ours / lora for ours, lora in turns]),
            "seconds": median(ours for ours, _ in turns),
            "device": device(),
        }
        print(asked.model, method, of_type[method], flush=True)
        io_ops.write_json(path, found)


if __name__ == "__main__":
    main()
