"""Progress of long work: a bar on a terminal, plain lines or nothing elsewhere."""

import threading
import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
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


MOMENT = 2.0
"""Seconds that nobody wonders about."""


class Waiting:
    """What takes longer than a moment: a line with a clock on a terminal, gone afterwards; elsewhere said once."""

    def __init__(self, console: Console, what: str) -> None:
        """Before it begins."""
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.bar.add_task(what)
        self.said = threading.Timer(MOMENT, console.print, [what], {"markup": False})
        self.said.daemon = True
        self.terminal = console.is_terminal

    def __enter__(self) -> "Waiting":
        """Begin."""
        self.bar.start()
        if not self.terminal:
            self.said.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Say nothing any more."""
        self.said.cancel()
        self.bar.stop()


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


class Runs:
    """Progress over several runs: what is running, k of n, and how long it may still take."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        """`done` were finished before."""
        self.console, self.total = console, total
        self.number = done
        """Of the run that is under way, from 1."""
        self.seconds: list[float] = []
        """Of each run finished here."""
        self.began, self.said, self.title = time.perf_counter(), 0, ""
        self.bar = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", total=total, completed=done)

    def __enter__(self) -> "Runs":
        """Show the bar."""
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the last state of the bar."""
        self.bar.stop()

    def started(self, title: str) -> None:
        """Begin with the next run."""
        self.number += 1
        self.began, self.said, self.title = time.perf_counter(), 0, title
        left = f"  left {duration(self.left(0))}" if self.seconds else ""
        self._plain(f"run {self.number}/{self.total}  {title}{left}")
        self.moved(0, "starting")

    def moved(self, share: float, what: str) -> None:
        """Show that this share of the run is done; plain lines at every quarter."""
        known = bool(self.seconds) or share > 0
        left = f"  left {duration(self.left(share))}" if known else ""
        self.bar.update(self.task, description=f"{self.title}  {what}{left}")
        if int(4 * share) > self.said:
            self.said = int(4 * share)
            self._plain(f"  {what}{left}")

    def ended(self, what: str, failed: bool = False) -> None:
        """The run is over; only what was done counts for how long the others will take."""
        if not failed:
            self.seconds.append(time.perf_counter() - self.began)
        self.bar.update(self.task, completed=self.number, description="")
        self.console.print(f"{'! ' * failed}{what}", style="yellow" if failed else None, markup=False)

    def left(self, share: float) -> float:
        """Seconds: as long as the runs before took on average, or at the pace of this one."""
        spent = time.perf_counter() - self.began
        one = sum(self.seconds) / len(self.seconds) if self.seconds else spent / share
        return max(one - spent, one * (1 - share), 0) + one * (self.total - self.number)

    def _plain(self, line: str) -> None:
        if not self.console.is_terminal:
            self.console.print(line, markup=False)
