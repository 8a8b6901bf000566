"""Every byte that is written to disk goes through here.

A file or a folder appears under its final name only when it is complete: it is made under a temporary name beside
the target, flushed to the disk, renamed, and the parent folder is flushed too. A crash leaves either the old
thing or the new one, and at most a `.tmp-` leftover that the next start removes.
"""

import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_cli.errors import ExitCode, UserError

TEMPORARY = ".tmp-"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def new_folder(target: Path) -> Generator[Path]:
    """Yield a temporary folder that becomes `target` when the block ends without an error.

    Raises:
        UserError: `target` exists, or the disk refuses.
    """
    if target.exists() or target.is_symlink():
        raise UserError("already exists", where=str(target), fix="name another folder", code=ExitCode.DISK)
    with _disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary_name(target)
        temporary.mkdir()
    try:
        with _disk_errors(target, only=FULL):  # what other libraries write into it
            yield temporary
        with _disk_errors(target):
            for path in temporary.rglob("*"):
                _readable(path)
                _flush(path)
            _flush(temporary)
            temporary.rename(target)
            _flush(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def make_folder(path: Path) -> None:
    """Make a folder and those above it; nothing happens when it is there."""
    with _disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def replace_folder(target: Path, source: Path) -> None:
    """Put the complete folder `source` in the place of `target`, which may exist; `source` is gone afterwards."""
    with _disk_errors(target):
        old = _temporary_name(target)
        if target.exists():
            target.rename(old)
        source.rename(target)
        _flush(target.parent)
        shutil.rmtree(old, ignore_errors=True)


def write_bytes(target: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with _disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary_name(target)
        try:
            temporary.write_bytes(content)
            _flush(temporary)
            temporary.replace(target)
            _flush(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Write a UTF-8 text file whole or not at all."""
    write_bytes(target, text.encode("utf-8"))


def write_json(target: Path, value: Any) -> None:
    """Write JSON with sorted keys, whole or not at all."""
    write_text(target, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


@contextmanager
def appending(target: Path) -> Generator[Callable[[bytes], None]]:
    """Yield a function that adds bytes to a new file: for what is too large to hold, inside a `new_folder`."""
    with _disk_errors(target):
        file = target.open("xb")

    def write(content: bytes) -> None:
        with _disk_errors(target):
            file.write(content)

    try:
        yield write
    finally:
        with _disk_errors(target):
            file.close()


def append_line(target: Path, line: str) -> None:
    """Add one line to a log. A crash can lose or cut the last lines, never an earlier one."""
    with _disk_errors(target), target.open("a", encoding="utf-8", opener=_no_link) as file:
        file.write(line + "\n")


def refuse_strange(folder: Path) -> None:
    """Refuse a folder that is a link, or holds one: what is written under its name would land elsewhere.

    Pipes and devices are refused as well: opening one may never end.

    Raises:
        UserError: naming it.
    """
    with _disk_errors(folder):
        for path in (folder, *(folder.iterdir() if folder.is_dir() else ())):
            if path.is_symlink():
                fix = "name the folder that it leads to, or take it away"
                what = f"is a link, to {path.readlink()}, and would be written through"
                raise UserError(what, where=str(path), fix=fix, code=ExitCode.DISK)
            if path.exists() and not path.is_file() and not path.is_dir():
                raise UserError("is neither a file nor a folder", where=str(path), code=ExitCode.DISK)


@contextmanager
def opened_to_lock(target: Path) -> Generator[int]:
    """Yield the handle of a file that is made where it is missing, and keeps what is in it."""
    with _disk_errors(target):
        handle = os.open(target, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        yield handle
    finally:
        os.close(handle)


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def remove(path: Path) -> None:
    """Remove a file or folder, under a temporary name first, so that no half-removed thing keeps its name."""
    with _disk_errors(path):
        going = _temporary_name(path)
        path.rename(going)
        if going.is_dir() and not going.is_symlink():
            shutil.rmtree(going)
        else:
            going.unlink()


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left under temporary names."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _temporary_name(target: Path) -> Path:
    return target.with_name(f"{TEMPORARY}{target.name}-{os.getpid()}-{secrets.token_hex(4)}")


def _readable(path: Path) -> None:
    """Give a file the permissions that the user's umask asks for; safetensors makes its files private."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _flush(path: Path) -> None:
    """Force a file's content, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _disk_errors(target: Path, only: tuple[int, ...] | None = None) -> Generator[None]:
    """Turn errors of the system into messages; of all kinds, or only those with these numbers."""
    try:
        yield
    except OSError as error:
        if only is not None and error.errno not in only:
            raise
        full = error.errno in FULL
        fix = (
            "free some space and run the same command again" if full else "check the path and its permissions"
        )
        raise UserError(
            f"cannot write ({error.strerror or error})", where=str(target), fix=fix, code=ExitCode.DISK
        ) from error
