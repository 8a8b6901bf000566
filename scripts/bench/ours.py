"""Our side of the benchmark: what `lora train` calls, with its defaults, on the rows of the workload file."""

from pathlib import Path
from typing import Any, cast

import numpy as np
from accelerate import Accelerator
from system import ALPHA, MAX_NORM, RATE, SEED, Job, R, Stamps, read_job

from lora_cli import model as models
from lora_cli.adapter import files
from lora_cli.data.example import Example
from lora_cli.data.load import Datasets
from lora_cli.data.pack import epoch_order
from lora_cli.recipe.schema import AdapterRecipe, DataRecipe, ModelRecipe, Recipe, TrainRecipe
from lora_cli.run import prepare
from lora_cli.screen import Screen
from lora_cli.train.loop import Training, train_steps


class Rows(list[Example]):
    """Examples in memory, with what the loop asks of those on disk."""

    def __init__(self, rows: list[dict[str, list[int]]], seed: int) -> None:
        """Placed so that the first epoch reads `rows` in their order."""
        order = epoch_order([cast(Any, None)] * len(rows), seed, 0)
        super().__init__(_example(rows[position], position) for position in np.argsort(order))
        self.lengths = np.array([len(example.input_ids) for example in self])
        self.trained_counts = np.array([sum(example.trained) for example in self])
        self.max_id = max(max(example.input_ids) for example in self)
        self.longest = int(self.lengths.max())


def _example(row: dict[str, list[int]], position: int) -> Example:
    trained = (False, *map(bool, row["trained"][1:]))
    return Example(tuple(row["input_ids"]), trained, f"row {position}")


def recipe_of(model: str, batch_size: int, steps: int, rows: str = "unused") -> Recipe:
    """The defaults, and what all systems have in common."""
    return Recipe(
        model=ModelRecipe(name=model),
        data=DataRecipe(train=cast(Any, rows)),
        adapter=AdapterRecipe(r=R, alpha=ALPHA),
        train=TrainRecipe(
            max_steps=steps,
            batch_size=batch_size,
            learning_rate=RATE,
            lr_scheduler="constant",
            max_grad_norm=MAX_NORM,
            seed=SEED,
        ),
    )


def training(job: Job, rows: list[dict[str, list[int]]]) -> Training:
    """A run about to take its first step."""
    recipe = recipe_of(job.model, job.batch_size, job.steps, job.rows)
    prepare.check_method(recipe)
    accelerator = Accelerator()
    language = models.load(recipe.model, accelerator.device)
    datasets = Datasets(cast(Any, Rows(rows, SEED)), None, None, cast(Any, None))
    run = prepare.training(recipe, language, datasets, accelerator, Screen.silent())
    files.fill(run.adapter, files.read(Path(job.adapter)))
    return run


def main() -> None:
    """Train and report."""
    job, stamps = read_job(), Stamps()
    rows = job.read_rows()
    for report in train_steps(training(job, rows)):
        stamps.step()
        stamps.losses.append(report.loss)
    stamps.report(rows, job.batch_size)


if __name__ == "__main__":
    main()
