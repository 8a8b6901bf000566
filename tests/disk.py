"""A disk that is watched: every operation on files below one folder is counted, and can be made to fail.

What io_ops does goes through a handful of functions of `os` and `io`; `Disk` stands in front of them. It notes each
operation in `log`, from which `after_crash` makes the states that a power loss may leave.
"""

import builtins
import errno
import io
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("mkdir", "rename", "replace", "unlink", "rmdir", "chmod", "fsync", "truncate", "ftruncate", "pwrite")
NEEDS_SPACE = ("mkdir", "create", "write", "rename", "replace", "pwrite")


@dataclass(frozen=True)
class Operation:
    """One change of the disk, by the full names of what it is about."""

    kind: str
    path: str
    to: str = ""
    content: bytes = b""


@dataclass
class Disk:
    """Watches `root`. `before` is called with each operation and its number, and may raise."""

    root: Path
    log: list[Operation] = field(default_factory=list)
    before: Callable[[Operation, int], None] = lambda operation, number: None
    tried: int = 0
    """Operations so far, with those that failed, which are not in `log`."""

    @contextmanager
    def watched(self) -> Iterator["Disk"]:
        """Stand in front of `os` and `io`."""
        real = {name: getattr(os, name) for name in NAMES}
        real_open, real_os_open = io.open, os.open
        with pytest.MonkeyPatch.context() as patch:
            for name, function in real.items():
                patch.setattr(os, name, self._named(name, function))
            patch.setattr(os, "open", self._opening(real_os_open))
            for module in (io, builtins):
                patch.setattr(module, "open", self._file(real_open))
            yield self

    def _inside(self, path: Any, dir_fd: int | None) -> str | None:
        if isinstance(path, int):
            path = _opened(path)
        full = (Path.cwd() if dir_fd is None else _opened(dir_fd)) / os.fsdecode(path)
        return str(full) if full.is_relative_to(self.root) else None

    def _note(self, operation: Operation) -> None:
        self.tried += 1
        self.before(operation, self.tried - 1)
        self.log.append(operation)

    def _named(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *others: Any, **named: Any) -> Any:
            full = self._inside(path, named.get("dir_fd"))
            if full is not None and not _does_nothing(name, full):
                to = self._inside(others[0], None) if name in ("rename", "replace") else ""
                content = bytes(others[0]) if name == "pwrite" else b""
                self._note(Operation(name, full, to or "", content))
            return function(path, *others, **named)

        return call

    def _opening(self, function: Callable[..., int]) -> Callable[..., int]:
        def call(path: Any, flags: int, *others: Any, **named: Any) -> int:
            full = self._inside(path, named.get("dir_fd"))
            if full is not None and flags & os.O_CREAT and not os.path.lexists(full):
                self._note(Operation("create", full))
            return function(path, flags, *others, **named)

        return call

    def _file(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, mode: str = "r", *others: Any, **named: Any) -> Any:
            full = None if isinstance(path, int) else self._inside(path, None)
            if full is None or not set(mode) & set("wxa"):
                return function(path, mode, *others, **named)
            assert "b" in mode, "io_ops writes bytes"
            if not os.path.lexists(full):
                self._note(Operation("create", full))
            return Watched(full, mode.replace("b", ""), self)

        return call


def _opened(handle: int) -> Path:
    return Path(f"/proc/self/fd/{handle}").readlink()


def _does_nothing(name: str, full: str) -> bool:
    """What there is, or is in nothing, cannot be made; what is not there cannot be removed."""
    there = os.path.lexists(full)
    return (name == "mkdir" and (there or not Path(full).parent.exists())) or (
        name in ("unlink", "rmdir") and not there
    )


class Watched(io.FileIO):
    """A file opened for writing, unbuffered; when a write fails, half of it is there."""

    def __init__(self, path: str, mode: str, disk: Disk) -> None:
        super().__init__(path, mode)
        self.disk, self.full = disk, path

    def write(self, content: Any) -> int:
        """Write all of it."""
        content = bytes(content)
        try:
            self.disk._note(Operation("write", self.full, content=content))
        except BaseException:
            super().write(content[: len(content) // 2])
            raise
        return super().write(content)

    def truncate(self, size: int | None = None) -> int:
        """Cut."""
        self.disk._note(Operation("cut", self.full, str(size)))
        return super().truncate(size)


def full_disk(first: int) -> Callable[[Operation, int], None]:
    """From operation `first` on there is no space left; what is there can be removed."""

    def before(operation: Operation, number: int) -> None:
        if number >= first and operation.kind in NEEDS_SPACE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return before


def failing(chosen: int) -> Callable[[Operation, int], None]:
    """Operation number `chosen` fails, whatever it is; the ones after it do not."""

    def before(operation: Operation, number: int) -> None:
        if number == chosen:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    return before


# ---- what a crash leaves ------------------------------------------------------------------------------------------


@dataclass
class File:
    """A file's bytes, and those that are certainly on the disk."""

    content: bytes = b""
    synced: bytes = b""


class Folder(dict[str, "File | Folder"]):
    """Names -> what they stand for; `pending` are changes of names that may not be on the disk yet."""

    def __init__(self) -> None:
        """Empty, and on the disk."""
        super().__init__()
        self.synced: dict[str, File | Folder] = {}
        self.pending: list[dict[str, File | Folder | None]] = []

    def change(self, names: dict[str, "File | Folder | None"]) -> None:
        """Give names to things, or with None take them; all at once, as a rename does."""
        _apply(self, names)
        self.pending.append(names)

    def sync(self) -> None:
        """All names are on the disk."""
        self.synced, self.pending = dict(self), []


def _apply(folder: dict[str, "File | Folder"], names: dict[str, "File | Folder | None"]) -> None:
    for name, thing in names.items():
        if thing is None:
            folder.pop(name, None)
        else:
            folder[name] = thing


class Tree:
    """The disk below `root` after some operations, with what of it is certain."""

    def __init__(self, root: Path) -> None:
        """`root` itself exists and is empty."""
        self.root, self.top = root, Folder()

    def find(self, path: Path) -> Any:
        """The file or folder with this full name."""
        thing: Any = self.top
        for name in path.relative_to(self.root).parts:
            thing = thing[name]
        return thing

    def do(self, operation: Operation) -> None:
        """Carry out one operation."""
        kind, path = operation.kind, Path(operation.path)
        name, folder = path.name, self.find(path.parent) if path != self.root else self.top
        if kind == "mkdir":
            folder.change({name: Folder()})
        elif kind == "create":
            folder.change({name: File()})
        elif kind in ("unlink", "rmdir"):
            folder.change({name: None})
        elif kind in ("rename", "replace"):
            assert Path(operation.to).parent == path.parent, "a rename stays in its folder"
            folder.change({name: None, Path(operation.to).name: folder[name]})
        elif kind == "write":
            folder[name].content += operation.content
        elif kind == "pwrite":
            folder[name].content = operation.content
        elif kind in ("cut", "ftruncate"):
            folder[name].content = folder[name].content[: int(operation.to or 0)]
        elif kind == "fsync":
            thing = self.find(path)
            if isinstance(thing, Folder):
                thing.sync()
            else:
                thing.synced = thing.content

    def write(self, target: Path) -> None:
        """What a killed process leaves: everything, whether on the disk already or not."""
        _write(self.top, target, lambda folder: dict(folder), lambda file: file.content)

    def write_crashed(self, target: Path, chance: random.Random) -> None:
        """What a power loss may leave: of what was not forced to the disk any part, in any order."""
        _write(self.top, target, lambda folder: _names_left(folder, chance), lambda file: _left(file, chance))


def _write(folder: Folder, target: Path, names: Callable[..., Any], content: Callable[[File], bytes]) -> None:
    target.mkdir()
    for name, thing in names(folder).items():
        if isinstance(thing, Folder):
            _write(thing, target / name, names, content)
        else:
            (target / name).write_bytes(content(thing))


def _names_left(folder: Folder, chance: random.Random) -> dict[str, "File | Folder"]:
    """The certain names, and any choice of the changes since."""
    left = dict(folder.synced)
    share = chance.choice([0.0, 0.3, 0.7, 1.0])
    for names in folder.pending:
        if chance.random() < share:
            _apply(left, names)
    return left


def _left(file: File, chance: random.Random) -> bytes:
    """What is certain; or all, a part, zeros in place of all that is new, or a part and zeros."""
    new, old = file.content, file.synced
    if new == old:
        return new
    start = len(old) if new.startswith(old) else 0
    cut = chance.randint(start, len(new))
    zeros = b"\0" * (len(new) - cut)
    return chance.choice([old, new, new[:cut], new[:start] + b"\0" * (len(new) - start), new[:cut] + zeros])
