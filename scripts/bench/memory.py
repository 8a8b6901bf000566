"""Peak memory of short runs: what the constants of `lora estimate` are fitted on. None of them is a scored workload.

    .venv/bin/python scripts/bench/memory.py --models models/smollm2-135m-instruct,models/smollm2-135m-instruct-bf16

Each run is a process of its own. Numbers go to scripts/bench/results/.
"""

import argparse
import json
import random
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from system import SEED, peak_rss_bytes

HERE = Path(__file__).parent
STEPS = 3


@dataclass(frozen=True)
class Case:
    """A run."""

    model: str
    lengths: tuple[int, ...]
    """Of the rows of each step."""
    learned: float
    """Share of the tokens of a row, at its end."""
    r: int = 16
    recompute: bool | int = False


def cases(model: str) -> list[Case]:
    """Other lengths, ranks and shares than those of the benchmark."""
    return [
        Case(model, (128,), 1.0),
        Case(model, (60, 70, 50, 40), 0.5, r=8),
        Case(model, (384, 384, 300), 0.3),
        Case(model, (640, 640), 1.0, r=32),
        Case(model, (1000,), 0.2, r=4),
        Case(model, (256,) * 6, 1.0, r=64),
        Case(model, (700, 30, 600, 120), 0.7, recompute=True),
        Case(model, (700, 30, 600, 120), 0.7, recompute=15),
    ]


def run(case: Case) -> dict[str, Any]:
    """Train, and say what it took."""
    from accelerate import Accelerator
    from ours import Rows, recipe_of

    from lora_cli import model as models
    from lora_cli.data.load import Datasets
    from lora_cli.recipe.schema import AdapterRecipe
    from lora_cli.run import prepare
    from lora_cli.train.loop import train_steps

    recipe = recipe_of(case.model, len(case.lengths), STEPS)
    train = recipe.train.model_copy(update={"gradient_checkpointing": case.recompute})
    recipe = recipe.model_copy(update={"adapter": AdapterRecipe(r=case.r), "train": train})
    floor, accelerator = peak_rss_bytes(), Accelerator()
    chance = random.Random(SEED)
    rows = [
        {
            "input_ids": [chance.randrange(1000, 40000) for _ in range(length)],
            "trained": [int(i >= length - case.learned * length) for i in range(length)],
        }
        for _ in range(STEPS)
        for length in case.lengths
    ]
    language = models.load(recipe.model, accelerator.device)
    loaded = peak_rss_bytes()
    datasets = Datasets(cast(Any, Rows(rows, SEED)), None, None, cast(Any, None))
    for _ in train_steps(prepare.training(recipe, language, datasets, accelerator)):
        pass
    return {**asdict(case), "imported": floor, "loaded": loaded, "peak_rss_bytes": peak_rss_bytes()}


def main() -> None:
    """Run every case and write what it took."""
    parser = argparse.ArgumentParser(description="peak memory of short runs")
    parser.add_argument("--models", default="models/smollm2-135m-instruct")
    parser.add_argument("--case", help="one case as JSON, in this process")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder")
    asked = parser.parse_args()
    if asked.case:
        print(json.dumps(run(Case(**json.loads(asked.case)))))
        return
    from run import device

    from lora_cli import io_ops

    path = asked.results / f"memory-{re.sub(r'[^a-z0-9]+', '-', device().lower()).strip('-')}.json"
    found = []
    for case in (case for model in asked.models.split(",") for case in cases(model)):
        command = [sys.executable, __file__, "--case", json.dumps(asdict(case))]
        found.append(json.loads(subprocess.check_output(command, text=True, timeout=600).splitlines()[-1]))
        print(found[-1], flush=True)
        io_ops.write_json(path, {"device": device(), "runs": found})


if __name__ == "__main__":
    main()
