"""Progress of long work: a bar on a terminal, plain lines or nothing elsewhere."""

import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lora_cli.screen import duration


class Counter:
    """A bar on a terminal; elsewhere silence but for the last line."""

    def __init__(self, console: Console, what: str, total: int) -> None:
        """Start at zero."""
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(what, total=total)

    def __enter__(self) -> "Counter":
        """Show the bar."""
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the bar."""
        self.bar.stop()

    def advance(self, count: int) -> None:
        """`count` more are done."""
        self.bar.advance(self.task, count)


class Steps:
    """Progress of a training run."""

    def __init__(self, console: Console, total: int, done: int, every: int) -> None:
        """Start at step `done`."""
        self.console, self.total, self.every, self.first = console, total, every, done
        self.began = time.perf_counter()
        self.bar = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", total=total, completed=done)

    def __enter__(self) -> "Steps":
        """Show the bar."""
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the last state of the bar."""
        self.bar.stop()

    def show(self, report: Any) -> None:
        """Show a `StepReport`."""
        line = (
            f"loss {report.loss:.4f}  lr {report.learning_rate:.2e}  grad {report.grad_norm:.2f}  "
            f"{report.tokens_per_second:,.0f} tok/s"
        )
        self.bar.update(self.task, completed=report.step, description=line)
        last = report.step == self.total
        if not self.console.is_terminal and (last or report.step % self.every == 0):
            left = (
                (time.perf_counter() - self.began) / (report.step - self.first) * (self.total - report.step)
            )
            self.console.print(
                f"step {report.step}/{self.total}  {line}  left {duration(left)}", markup=False
            )
