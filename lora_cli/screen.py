"""What a person sees while a command runs: on stderr, rich on a terminal, plain lines anywhere else."""

import json
import os
import sys
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from lora_cli.errors import without_passwords

if TYPE_CHECKING:
    from lora_cli.progress import Counter, Runs, Steps, Waiting


class Screen:
    """Notes, tables and progress. Results meant for programs go to stdout through `result`."""

    def __init__(self, stderr: bool = True) -> None:
        """Write to stderr, or to stdout where what is shown is the result; NO_COLOR is honoured by rich."""
        terminal = (sys.stderr if stderr else sys.stdout).isatty()
        width = None if terminal else int(os.environ.get("COLUMNS", "110"))
        self.console = Console(stderr=stderr, width=width, highlight=False, soft_wrap=not terminal)

    @classmethod
    def silent(cls) -> "Screen":
        """Shows nothing: for the processes beside the one that speaks."""
        screen = cls()
        screen.console = Console(stderr=True, quiet=True)
        return screen

    def note(self, text: str) -> None:
        """One line of plain information."""
        self.console.print(without_passwords(text), markup=False)

    def warn(self, text: str) -> None:
        """One line that should not be missed."""
        self.console.print(without_passwords(f"! {text}"), style="yellow", markup=False)

    def error(self, text: str) -> None:
        """What went wrong."""
        self.console.print(without_passwords(f"error: {text}"), style="red", markup=False)

    def heading(self, text: str) -> None:
        """What follows belongs together."""
        self.console.print(f"\n{text}", style="bold", markup=False)

    def text(self, text: Text) -> None:
        """Styled text, such as trained tokens in colour."""
        self.console.print(text)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """A table; the first column is text, numbers are right-aligned."""
        from rich.table import Table

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        rows = [list(row) for row in rows]
        for index, column in enumerate(columns):
            numeric = all(isinstance(row[index], int | float) for row in rows) and bool(rows)
            table.add_column(column, justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(shown(value)) for value in row))
        self.console.print(table)

    @contextmanager
    def steps(self, total: int, done: int, every: int) -> Generator["Steps"]:
        """Progress over `total` optimizer steps, of which `done` are done; a plain line every `every` steps."""
        from lora_cli.progress import Steps

        with Steps(self.console, total, done, every) as steps:
            yield steps

    @contextmanager
    def counting(self, what: str, total: int) -> Generator["Counter"]:
        """Progress over `total` things that are not optimizer steps."""
        from lora_cli.progress import Counter

        with Counter(self.console, what, total) as counter:
            yield counter

    @contextmanager
    def waiting(self, what: str) -> Generator["Waiting"]:
        """Say what is going on where it takes longer than a moment."""
        from lora_cli.progress import Waiting

        with Waiting(self.console, without_passwords(what)) as waiting:
            yield waiting

    @contextmanager
    def runs(self, total: int, done: int) -> Generator["Runs"]:
        """Progress over `total` runs of a comparison, of which `done` are done."""
        from lora_cli.progress import Runs

        with Runs(self.console, total, done) as runs:
            yield runs

    def result(self, value: Any, as_json: bool) -> None:
        """The command's result: JSON on stdout when asked for, else nothing (it has been shown)."""
        if as_json:
            print(without_passwords(json.dumps(value, ensure_ascii=False)))


def duration(seconds: float) -> str:
    """`41s`, `3m 20s`, `2h 05m`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes_left:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


def size(count: float, base: int = 1000, units: Sequence[str] = ("", "K", "M", "G", "T")) -> str:
    """`4.88M` of 4,884,480."""
    for unit in units[:-1]:
        if abs(count) < base:
            return f"{count:.3g}{unit}" if unit else f"{count:g}"
        count /= base
    return f"{count:.3g}{units[-1]}"


def shown(value: Any) -> str:
    """A table cell: numbers short, nothing for None, no passwords."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return without_passwords(str(value))
