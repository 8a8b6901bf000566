"""Ctrl-C and SIGTERM stop long work at the next good moment."""

import signal
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_cli.errors import ExitCode, UserError


class Stop:
    """Set by the first SIGINT or SIGTERM; the second ends the process at once."""

    def __init__(self) -> None:
        """Nobody has asked."""
        self.asked = False

    def ask(self, number: int, frame: Any) -> None:
        """Signal handler."""
        if self.asked:
            raise SystemExit(ExitCode.INTERRUPTED)
        self.asked = True

    def leave(self, step: int, total: int, folder: Path) -> None:
        """Leave, once everything is saved, if somebody has asked."""
        if self.asked and step < total:
            raise UserError(
                f"stopped after step {step} of {total}; everything is saved",
                where=str(folder),
                fix="the same command with --resume goes on",
                code=ExitCode.INTERRUPTED,
            )


@contextmanager
def stop_signals() -> Generator[Stop]:
    """Inside the block SIGINT and SIGTERM ask to stop after the step that is under way."""
    stop = Stop()
    before = {number: signal.signal(number, stop.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
