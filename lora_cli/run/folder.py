"""The run folder: adapter/, checkpoints/, recipe.yaml, log.jsonl, loss.png. One process at a time may write in it."""

import fcntl
import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_cli import io_ops
from lora_cli.errors import ExitCode, UserError


class RunFolder:
    """Paths and the log of one run."""

    def __init__(self, root: Path) -> None:
        """Name the parts; nothing is made yet."""
        self.root = root
        self.adapter = root / "adapter"
        self.checkpoints = root / "checkpoints"
        self.recipe = root / "recipe.yaml"
        self.log = root / "log.jsonl"
        self.plot = root / "loss.png"

    @contextmanager
    def held(self) -> Generator[None]:
        """Make the folder and hold it for this process; the kernel lets go when the process ends, however it ends.

        Raises:
            UserError: another process holds it, or it leads elsewhere.
        """
        io_ops.refuse_strange(self.root)
        io_ops.make_folder(self.root)
        with io_ops.opened_to_lock(self.root / ".lock") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                fix = "wait for it, or name another folder with --output"
                what = "another run is writing here"
                raise UserError(what, where=str(self.root), fix=fix, code=ExitCode.LOCKED) from error
            io_ops.remove_leftovers(self.root)
            io_ops.remove_leftovers(self.checkpoints)
            yield

    def check_new(self) -> None:
        """Refuse a folder that holds a run.

        Raises:
            UserError: it does.
        """
        if self.recipe.exists() or self.adapter.exists():
            fix = "--resume goes on with it, --output names another folder"
            raise UserError("holds a run already", where=str(self.root), fix=fix, code=ExitCode.LOCKED)

    def append(self, line: dict[str, Any]) -> None:
        """Add a line to the log."""
        io_ops.append_line(self.log, json.dumps(line))

    def cut_log(self, step: int) -> None:
        """Forget what was logged after `step`, which is done again."""
        kept = [line for line in self.lines() if line["step"] <= step]
        io_ops.write_text(self.log, "".join(json.dumps(line) + "\n" for line in kept))

    def lines(self) -> list[dict[str, Any]]:
        """The log; a last line cut by a crash is left out."""
        if not self.log.exists():
            return []
        found: list[dict[str, Any]] = []
        for line in self.log.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                break
        return found
