"""Experiment trackers, through accelerate."""

import dataclasses
import json
from typing import Any

from accelerate import Accelerator

from lora_cli.errors import UserError
from lora_cli.recipe.schema import Recipe
from lora_cli.run.folder import RunFolder
from lora_cli.train.loop import StepReport


class Trackers:
    """The trackers of a recipe; with none named everything here does nothing."""

    def __init__(self, recipe: Recipe, folder: RunFolder) -> None:
        """Start them, in the process that writes.

        Raises:
            UserError: a tracker's package is not installed.
        """
        self.names = recipe.train.trackers if folder.writes else ()
        if not self.names:
            return
        try:
            self.accelerator = Accelerator(log_with=list(self.names), project_dir=str(folder.root))
            flat = {key: json.dumps(value) for key, value in recipe.model_dump().items()}
            self.accelerator.init_trackers("trackers", config=flat)
        except (ImportError, ValueError) as error:
            fix = "pip install 'lora-cli[trackers]', or the tracker's own package"
            raise UserError(str(error), where="train.trackers", fix=fix) from error

    def log(self, report: StepReport, every: int) -> None:
        """Log a step, every so many steps."""
        if self.names and report.step % every == 0:
            self.log_values(dataclasses.asdict(report), report.step)

    def log_values(self, values: dict[str, Any], step: int) -> None:
        """Log numbers at a step."""
        if self.names:
            self.accelerator.log(values, step=step)

    def end(self) -> None:
        """Let them finish writing."""
        if self.names:
            self.accelerator.end_training()
