"""`lora train` on a task."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from scripts.faults.server import serve
from scripts.faults.task import ALPHA, SEED, R, Task


def recipe_of(task: Task) -> dict[str, Any]:
    """The task as a recipe: its defaults, but for what the task says."""
    adapter: dict[str, Any] = {"r": R, "alpha": ALPHA, "dropout": task.dropout}
    if task.targets:
        adapter["target_modules"] = [*task.targets]
    train = {
        "max_steps": task.steps,
        "batch_size": task.batch_size,
        "micro_batch_size": task.at_once,
        "learning_rate": task.learning_rate,
        "save_steps": task.save_steps,
        "seed": SEED,
    }
    return {
        "model": {"name": task.model},
        "data": {
            "train": task.rows,
            "format": {"prompt": "{prompt}", "completion": "{completion}"},
            "max_length": task.max_length,
        },
        "adapter": adapter,
        "train": {**train, **task.extra},
        "output": {"dir": task.out},
    }


def become(system: str, task: Task) -> None:
    """Do the task."""
    if task.configs:
        read(task)
    else:
        train(task)


def train(task: Task) -> None:
    """`lora train RECIPE --resume`, a first time or again."""
    from lora_cli.cli import main

    recipe = Path(task.out).with_suffix(".yaml")
    if not recipe.exists():
        whole = recipe.with_suffix(".new")
        whole.write_text(json.dumps(recipe_of(task), indent=1))
        whole.rename(recipe)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as `main` does first of all
    sys.argv = ["lora", "train", str(recipe), "--resume"]
    try:
        main()
    except KeyboardInterrupt:  # before `main` was there to answer it
        os._exit(75)


def read(task: Task) -> None:
    """Read the configurations; one line of JSON each: how it ended, and what was said."""
    from lora_cli.errors import UserError
    from lora_cli.recipe.load import load

    for path in task.configs:
        try:
            load(Path(path))
            print(json.dumps(["read", ""]))
        except UserError as error:
            print(json.dumps(["refused", str(error)]))
        except BaseException as error:
            print(json.dumps(["traceback", f"{type(error).__name__}: {error}"]))


def main() -> None:
    """Load everything, then answer."""
    import torch

    import lora_cli.run.train
    from tests import tiny

    assert lora_cli.run.train
    torch.set_num_threads(1)
    tiny.model()  # transformers loads the files of a kind of model on first use
    serve(become)


if __name__ == "__main__":
    main()
