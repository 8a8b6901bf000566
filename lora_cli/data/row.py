"""One record of the data, and how to complain about it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli.errors import ExitCode, UserError


@dataclass(frozen=True, slots=True)
class Row:
    """One record as it stands in its source."""

    values: dict[str, Any]
    where: str
    """`file:line` of its first line; rows of tables are counted from 1."""


def wrong(what: str, where: str, fix: str = "") -> UserError:
    """An error in the data."""
    return UserError(what, where=where, fix=fix, code=ExitCode.DATA)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the system's refusal to read a file into an error in the data."""
    try:
        yield
    except OSError as error:
        raise wrong(f"cannot be read ({error.strerror or error})", str(path)) from error
