"""Peak memory of short runs: what the constants of `lora estimate` are fitted on. None of them is a scored workload.

    .venv/bin/python scripts/bench/memory.py --models models/smollm2-135m-instruct,models/smollm2-135m-instruct-bf16
    .venv/bin/python scripts/bench/memory.py --shared --models ...

Each run is a process of its own, or as many as share its base out. Numbers go to scripts/bench/results/. With --shared
nothing is fitted on them: they are what predictions of several processes and of quantised bases are held against. Then
glibc is told to give back what is freed, because how much of it is lost in gaps differs by a third from run to run.
"""

import argparse
import json
import os
import random
import re
import socket
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
    processes: int = 1
    """That share the base out."""
    quantize: str = "none"


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


def shared_cases(model: str) -> list[Case]:
    """By two processes, with a base that is quantised or not."""
    rows = (128, 128, 100, 100)
    return [Case(model, rows, 0.5, processes=2, quantize=kind) for kind in ("nf4", "none")]


def recipe_of(case: Case) -> Any:
    """For `lora`."""
    import ours

    from lora_cli.recipe.schema import AdapterRecipe

    recipe = ours.recipe_of(case.model, len(case.lengths), STEPS)
    parallel = "fsdp" if case.processes > 1 else "ddp"
    train = {"gradient_checkpointing": case.recompute, "parallel": parallel}
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"quantize": case.quantize}),
            "adapter": AdapterRecipe(r=case.r),
            "train": recipe.train.model_copy(update=train),
        }
    )


def run(case: Case) -> dict[str, Any]:
    """Train, and say what it took."""
    from ours import Rows

    from lora_cli.data.load import Datasets
    from lora_cli.run import prepare
    from lora_cli.screen import Screen
    from lora_cli.train.loop import train_steps
    from lora_cli.train.processes import joined

    recipe, floor, chance = recipe_of(case), peak_rss_bytes(), random.Random(SEED)
    rows = [
        {
            "input_ids": [chance.randrange(1000, 40000) for _ in range(length)],
            "trained": [int(i >= length - case.learned * length) for i in range(length)],
        }
        for _ in range(STEPS)
        for length in case.lengths
    ]
    datasets = Datasets(cast(Any, Rows(rows, SEED)), None, None, cast(Any, None))
    with joined() as accelerator:
        language = prepare.load_model(recipe, accelerator)
        loaded = peak_rss_bytes()
        training = prepare.training(recipe, language, datasets, accelerator, Screen.silent())
        prepared = peak_rss_bytes()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        for _ in train_steps(training):
            pass
        taken = {"loaded": loaded, "prepared": prepared, "peak_rss_bytes": peak_rss_bytes()}
    return {**asdict(case), "imported": floor, **taken}


GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def together(case: Case, environment: dict[str, str]) -> dict[str, Any]:
    """In processes of their own; what the largest of them took."""
    command = [sys.executable, __file__, "--case", json.dumps(asdict(case))]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    place |= {"WORLD_SIZE": str(case.processes), "LOCAL_WORLD_SIZE": str(case.processes)}
    started = [
        subprocess.Popen(
            command,
            text=True,
            stdout=subprocess.PIPE,
            env=os.environ
            | environment
            | (place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if case.processes > 1 else {}),
        )
        for rank in range(case.processes)
    ]
    said = [process.communicate(timeout=600)[0] for process in started]
    found = [json.loads(lines.splitlines()[-1]) for lines in said]
    return max(found, key=lambda each: each["peak_rss_bytes"])


def main() -> None:
    """Run every case and write what it took."""
    parser = argparse.ArgumentParser(description="peak memory of short runs")
    parser.add_argument("--models", default="models/smollm2-135m-instruct")
    parser.add_argument("--shared", action="store_true", help="quantised bases, and such as are shared out")
    parser.add_argument("--case", help="one case as JSON, in this process")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder")
    asked = parser.parse_args()
    if asked.case:
        print(json.dumps(run(Case(**json.loads(asked.case)))))
        return
    from run import device

    from lora_cli import io_ops

    name = "memory-shared" if asked.shared else "memory"
    path = asked.results / f"{name}-{re.sub(r'[^a-z0-9]+', '-', device().lower()).strip('-')}.json"
    make, found = shared_cases if asked.shared else cases, []
    for case in (case for model in asked.models.split(",") for case in make(model)):
        found.append(together(case, GIVING_BACK if asked.shared else {}))
        print(found[-1], flush=True)
        io_ops.write_json(path, {"device": device(), "runs": found})


if __name__ == "__main__":
    main()
