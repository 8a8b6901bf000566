"""The run folder: adapter/, checkpoints/, recipe.yaml, origin.json, log.jsonl, loss.png.

One process at a time may write in it.
"""

import json
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lora_cli import io_ops
from lora_cli.errors import ExitCode, UserError

LOCK = ".lock"


class RunFolder:
    """Paths and the log of one run."""

    writes = True

    def __init__(self, root: Path) -> None:
        """Name the parts; nothing is made yet."""
        self.root = root
        self.adapter = root / "adapter"
        self.checkpoints = root / "checkpoints"
        self.recipe = root / "recipe.yaml"
        self.log = root / "log.jsonl"
        self.plot = root / "loss.png"
        self.cache = root / "cache"
        self.origin = root / "origin.json"
        self.waiting = ""
        """Log lines that the disk refused so far."""

    @contextmanager
    def held(self) -> Generator[None]:
        """Make the folder and hold it for this process.

        Raises:
            UserError: another process holds it, nothing can be written in it, or it leads elsewhere.
        """
        io_ops.refuse_strange(self.root)
        io_ops.make_folder(self.root)
        with io_ops.held(self.root / LOCK):
            io_ops.check_writable(self.root)
            for folder in (self.root, self.checkpoints, self.cache):
                io_ops.remove_leftovers(folder)
            yield

    def check_new(self) -> None:
        """Refuse a folder that holds a run.

        Raises:
            UserError: it does.
        """
        if os.path.lexists(self.recipe) or os.path.lexists(self.adapter):
            fix = "--resume goes on with it, --output names another folder"
            raise UserError("holds a run already", where=str(self.root), fix=fix, code=ExitCode.LOCKED)

    @property
    def holds_steps(self) -> bool:
        """Whether anything that was learned is here."""
        return self.adapter.exists() or any(self.checkpoints.glob("step-*"))

    def clear(self) -> None:
        """Leave nothing of a run that has learned nothing, but rows that are tokenised already."""
        for path in (self.recipe, self.origin, self.log):
            if os.path.lexists(path):
                io_ops.remove(path)
        io_ops.remove_empty(self.checkpoints, self.cache)
        if [path.name for path in self.root.iterdir()] == [LOCK]:
            io_ops.remove(self.root / LOCK)
            io_ops.remove_empty(self.root)

    def append(self, line: dict[str, Any]) -> None:
        """Add a line to the log. A full disk does not stop the run: the line waits, and `flush_log` says so."""
        self.waiting += json.dumps(line) + "\n"
        with suppress(UserError):
            self._write_waiting()

    def flush_log(self) -> None:
        """Force what was logged to the disk: a checkpoint is worth no more than the log that belongs to it.

        Raises:
            UserError: the disk refuses.
        """
        self._write_waiting()
        if self.log.exists():
            io_ops.flush(self.log)

    def _write_waiting(self) -> None:
        if self.waiting:
            io_ops.append_line(self.log, self.waiting.removesuffix("\n"))
            self.waiting = ""

    def cut_log(self, step: int, evaluated: int) -> None:
        """Forget the steps after `step` and the evaluations after step `evaluated`, which are done again."""
        kept = [line for line in self.lines() if line["step"] <= (evaluated if "eval_loss" in line else step)]
        io_ops.write_text(self.log, "".join(json.dumps(line) + "\n" for line in kept))

    def lines(self) -> list[dict[str, Any]]:
        """The log; what a crash made of its last lines is left out."""
        if not self.log.exists():
            return []
        found: list[dict[str, Any]] = []
        for line in self.log.read_bytes().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                break
        return found


class Onlooker(RunFolder):
    """The folder for processes beside the one that writes: they read in it, and what would write does nothing."""

    writes = False

    @contextmanager
    def held(self) -> Generator[None]:
        """By the process that writes."""
        yield

    def check_new(self) -> None:
        """Done by the process that writes."""

    def clear(self) -> None:
        """Done by the process that writes."""

    def append(self, line: dict[str, Any]) -> None:
        """Nothing."""

    def flush_log(self) -> None:
        """Nothing."""

    def cut_log(self, step: int, evaluated: int) -> None:
        """Nothing."""
