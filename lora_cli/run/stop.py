"""Ctrl-C and SIGTERM stop long work at the next good moment."""

import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from lora_cli.errors import ExitCode, UserError

T = TypeVar("T")


class BrokenOff(KeyboardInterrupt):
    """Raised inside `Stop.unless_asked` only."""


class Stop:
    """Set by the first SIGINT or SIGTERM; the second ends the process at once."""

    def __init__(self, anywhere: bool = True) -> None:
        """Nobody has asked.

        Args:
            anywhere: whether work may be broken off at any point. Where other processes wait for what this one
                computes, the work itself has to raise `BrokenOff`, in all of them at the same point.
        """
        self.asked = self.breaks = False
        self.anywhere = anywhere

    def ask(self, number: int, frame: Any) -> None:
        """Signal handler."""
        if self.asked:
            raise SystemExit(ExitCode.INTERRUPTED)
        self.asked = True
        if self.breaks:
            raise BrokenOff

    def unless_asked(self, work: Callable[[], T]) -> T | None:
        """Do what can be done again later; the first signal breaks it off without an error, and there is no result."""
        try:
            try:
                self.breaks = self.anywhere
                return None if self.asked and self.anywhere else work()
            finally:
                self.breaks = False
        except BrokenOff:
            return None
        except Exception:
            if not (self.asked and self.anywhere):  # else it is what a library made of the break
                raise
            return None

    def leave(self, step: int, total: int, folder: Path) -> NoReturn:
        """Leave, once everything is saved."""
        raise UserError(
            f"stopped after step {step} of {total}; everything is saved",
            where=str(folder),
            fix="the same command with --resume goes on",
            code=ExitCode.INTERRUPTED,
        )


@contextmanager
def stop_signals(anywhere: bool = True) -> Generator[Stop]:
    """Inside the block SIGINT and SIGTERM ask to stop after the step that is under way."""
    stop = Stop(anywhere)
    before = {number: signal.signal(number, stop.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
