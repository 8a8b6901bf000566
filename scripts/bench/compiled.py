"""What `train.compile` saves: the same steps as written and compiled, of one base in one process, in turns.

    .venv/bin/python scripts/bench/compiled.py --model models/smollm2-135m-instruct --methods lora,dora

Rows as in methods.py. Nothing else may run. Ratios are made within a turn; the first turns compile and warm up. What
is found is added to scripts/bench/results/compiled-<device>.json, with the seconds of the first compiled step.
"""

import argparse
import json
import re
from pathlib import Path
from statistics import median
from typing import Any

import torch
from methods import ROWS, WARM_UP, summary, training
from ours import recipe_of
from run import device

from lora_cli import io_ops
from lora_cli import model as models
from lora_cli.model import LanguageModel
from lora_cli.train.compiled import as_written, compile_blocks
from lora_cli.train.loop import train_steps


def seconds(language: LanguageModel, method: str, turns: int) -> list[tuple[float, float]]:
    """Of a step as written and of one compiled, turn by turn; who is first changes."""
    runs = [training(language, method, turns) for _ in range(2)]
    runs[0].adapter.activate()  # some blocks have adapted layers for pieces
    compile_blocks(language.model)
    runs[0].adapter.deactivate()
    steps = [train_steps(run) for run in runs]
    found = []
    for turn in range(turns):
        taken = {}
        for number in (0, 1) if turn % 2 else (1, 0):
            runs[number].adapter.activate()
            with as_written(number == 0):
                taken[number] = next(steps[number]).seconds
            runs[number].adapter.deactivate()
        found.append((taken[0], taken[1]))
    return found


def main() -> None:
    """Measure each method, and write it down as it comes."""
    parser = argparse.ArgumentParser(description="what a compiled step saves")
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--methods", default="lora")
    parser.add_argument("--turns", type=int, default=18)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder")
    asked = parser.parse_args()
    name = re.sub(r"[^a-z0-9]+", "-", device().lower()).strip("-")
    path = asked.results / f"compiled-{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for method in asked.methods.split(","):
        language = models.load(recipe_of(asked.model, ROWS, 1).model, torch.device("cpu"))
        turns = seconds(language, method, asked.turns)
        of_type = found.setdefault(str(language.model.dtype).removeprefix("torch."), {})
        of_type[method] = {
            "speed_up": summary([plain / made for plain, made in turns[WARM_UP:]]),
            "seconds": median(made for _, made in turns[WARM_UP:]),
            "first_seconds": turns[0][1],
            "device": device(),
        }
        print(asked.model, method, of_type[method], flush=True)
        io_ops.write_json(path, found)


if __name__ == "__main__":
    main()
