"""What can go wrong for a user, and the exit code that says so.

UserError       a message for a person: what is wrong, where, what to do; never a traceback
├ several       `UserError.several` joins the errors of one file into one report
├ UnknownCostError   what a run would cost cannot be found out
└ AloneError         another process of the run is gone
ExitCode        published; scripts rely on it
short           what a user wrote, as it stands in a message
some_of         the first of many places, and how many more there are
"""

import re
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum

LONGEST = 60
"""Characters of what a user wrote that a message repeats."""
SHOWN = 5
"""Places named in an error that is about many."""
USER = re.compile(r"(:/+)[^/\s@\"']+(?=@)")
"""Name and password in an address."""
KEY = re.compile(r"(?:model|data|adapter|train|eval|output)(?:\.\w+)+")
"""A key of a recipe, at the beginning of what an error is about."""


def short(text: str) -> str:
    """Long text cut, and what a terminal does not show as a character escaped: a message stays one, on its lines."""
    text = text if len(text) <= LONGEST else text[:LONGEST] + "…"
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def some_of(places: Sequence[str]) -> str:
    """The first few of many, and how many more there are."""
    more = len(places) - SHOWN
    return ", ".join(places[:SHOWN]) + (f" and {more} more" if more > 0 else "")


class ExitCode(IntEnum):
    """Exit codes of every command."""

    DONE = 0
    RECIPE = 2
    """The recipe or the command line is wrong."""
    LOCKED = 3
    """Another run holds the output folder, or it holds a finished or unfinished run."""
    NON_FINITE = 4
    """The loss or a gradient was not a finite number; the weights are those of the step before."""
    NO_CHECKPOINT = 5
    """No usable checkpoint is left to go on from."""
    DISK = 6
    """Something could not be written or read."""
    DATA = 7
    """A data file is missing or a row in it is wrong."""
    LEARNED_NOTHING = 8
    """The run could not have learned anything."""
    VERIFICATION = 9
    """What was written does not compute what it should."""
    OUT_OF_MEMORY = 10
    """Not even one example fits in memory."""
    MODEL = 11
    """The model is missing, of the wrong kind, or does not fit the adapter."""
    PARTLY = 12
    """Some runs of a comparison failed; the others are finished."""
    INTERRUPTED = 75
    """Stopped by a signal; the same command with --resume goes on."""


class UserError(Exception):
    """A mistake the user can mend.

    Args:
        what: what is wrong, in one sentence without a full stop.
        where: file:line, key or layer that it is about.
        fix: what to do about it.
        code: the process's exit code.
        beside: of two keys that do not go together the one that `what` names, in its words.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        fix: str = "",
        code: ExitCode = ExitCode.RECIPE,
        beside: str = "",
    ) -> None:
        """Keep the parts, so that a test or another front end can ask for them."""
        super().__init__(what)
        self.what, self.where, self.fix, self.code, self.beside = what, where, fix, code, beside
        self.joined: tuple[UserError, ...] = ()

    def __str__(self) -> str:
        """`where: what (fix)`, the form every message has."""
        head = f"{self.where}: " if self.where else ""
        tail = f"\n  → {self.fix}" if self.fix else ""
        return without_passwords(f"{head}{self.what}{tail}")

    @classmethod
    def several(cls, errors: Iterable["UserError"]) -> "UserError":
        """One error that reports all of `errors`, with the code of the first."""
        found = list(errors)
        if len(found) == 1:
            return found[0]
        joined = cls("\n".join(str(error) for error in found), code=found[0].code)
        joined.joined = tuple(found)
        return joined

    def placed(self, origin: Callable[[str], str]) -> "UserError":
        """The same, with the place of every key that it is about.

        Args:
            origin: dotted key -> where it was written, such as file:line; empty where it was not.
        """
        if self.joined:
            return UserError.several(error.placed(origin) for error in self.joined)
        first, second = (
            origin(found[0]) if (found := KEY.match(each)) else "" for each in (self.where, self.beside)
        )
        where = f"{first}: {self.where}" if first else self.where
        what = self.what.replace(self.beside, f"{self.beside} ({second})", 1) if second else self.what
        return type(self)(what, where=where, fix=self.fix, code=self.code)


class UnknownCostError(UserError):
    """What a run would cost cannot be found out."""


class AloneError(UserError):
    """Another process of the run has ended. That one, or who started them all, has more to say about it."""


def without_passwords(text: str) -> str:
    """A text for people, with `***` for the name and password in every address."""
    return USER.sub(r"\1***", text)
