"""Every byte that is written to disk goes through here.

A file or a folder appears under its final name only when it is complete: it is made under a temporary name beside
the target, flushed to the disk, renamed, and the parent folder is flushed too. A crash leaves either the old
thing or the new one, and at most a `.tmp-` leftover that the next start removes.
"""

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lora_cli.errors import ExitCode, UserError

TEMPORARY = ".tmp-"
LEFTOVER = re.compile(r"\.tmp-.+-\d+-[0-9a-f]{8}")
"""The names that `_temporary_name` makes; what others call `.tmp-` is theirs."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def new_folder(target: Path) -> Generator[Path]:
    """Yield a temporary folder that becomes `target` when the block ends without an error.

    Raises:
        UserError: `target` exists, or the disk refuses.
    """
    with _disk_errors(target):
        if os.path.lexists(target):
            raise UserError(
                "already exists", where=str(target), fix="name another folder", code=ExitCode.DISK
            )
        _make(target.parent)
        temporary = _temporary_name(target)
        temporary.mkdir()
        made = os.open(temporary, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network disks cannot; then `remove_abandoned` leaves it
            fcntl.flock(made, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
    finally:
        os.close(made)


def remove_abandoned(target: Path) -> None:
    """Remove what killed processes left of `target`, which may be large, but not what one is at work on."""
    with _disk_errors(target):
        for path in target.parent.iterdir() if target.parent.is_dir() else ():
            named = path.name.startswith(f"{TEMPORARY}{target.name}-") and LEFTOVER.fullmatch(path.name)
            if named and path.is_dir() and not path.is_symlink() and _abandoned(path):
                shutil.rmtree(path)


def _abandoned(folder: Path) -> bool:
    """Whether nobody holds the lock that `new_folder` takes; the kernel frees that of a killed process."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def make_folder(path: Path) -> None:
    """Make a folder and those above it; nothing happens when it is there."""
    with _disk_errors(path):
        _make(path)


def check_writable(folder: Path) -> None:
    """Try out whether something can be made in a folder that exists.

    Raises:
        UserError: nothing can.
    """
    with _disk_errors(folder):
        probe = _temporary_name(folder / "probe")
        probe.mkdir()
        probe.rmdir()


@contextmanager
def held(lock: Path) -> Generator[None]:
    """Hold a file for this process; the kernel lets go when the process ends, however it ends.

    Raises:
        UserError: another process holds it, which is named, or it cannot be written, or is a name of another file.
    """
    with _disk_errors(lock):
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        with _disk_errors(lock):
            if os.fstat(handle).st_nlink > 1:  # what is noted in it would be written over the other
                what, fix = "is a second name of some other file", "remove this one"
                raise UserError(what, where=str(lock), fix=fix, code=ExitCode.DISK)
            _lock(handle, lock.parent)
            if not lock.exists() or not os.path.samestat(os.fstat(handle), lock.stat()):
                what, fix = "a run that was stopped here is just leaving", "start again"
                raise UserError(what, where=str(lock.parent), fix=fix, code=ExitCode.LOCKED)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(handle, 200, 0).decode("utf-8", errors="replace").strip()
        what = f"another run is writing here ({holder})" if holder else "another run is writing here"
        fix = "wait for it, or name another folder with --output"
        raise UserError(what, where=str(folder), fix=fix, code=ExitCode.LOCKED) from error
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def write_bytes(target: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with _disk_errors(target):
        _make(target.parent)
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
def appending(target: Path) -> Generator[Callable[[bytes | memoryview], None]]:
    """Yield a function that adds bytes to a new file: for what is too large to hold, inside a `new_folder`."""
    with _disk_errors(target):
        file = target.open("xb")

    def write(content: bytes | memoryview) -> None:
        with _disk_errors(target):
            file.write(content)

    try:
        yield write
    finally:
        with _disk_errors(target):
            file.close()


def append_line(target: Path, line: str) -> None:
    """Add one line to a log; a refused one leaves nothing. A crash can lose or cut the last lines, never others."""
    with _disk_errors(target), open(target, "ab", buffering=0, opener=_no_link) as file:
        size = file.tell()
        left = memoryview(f"{line}\n".encode())
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(size)
            raise


def flush(target: Path) -> None:
    """Force a file that was appended to, and its name, to the disk."""
    with _disk_errors(target):
        _flush(target)
        _flush(target.parent)


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


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def remove(path: Path) -> None:
    """Remove a file or folder, under a temporary name first, so that no half-removed thing keeps its name."""
    with _disk_errors(path):
        going = _temporary_name(path)
        path.rename(going)
        _flush(path.parent)
        if going.is_dir() and not going.is_symlink():
            shutil.rmtree(going)
        else:
            going.unlink()


def remove_empty(*folders: Path) -> None:
    """Remove those of the folders that hold nothing."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left under temporary names."""
    with _disk_errors(folder):
        for path in folder.glob(f"{TEMPORARY}*"):
            if LEFTOVER.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _make(folder: Path) -> None:
    """Make a folder and those above it; what is put in it later is only as durable as its name."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in missing:
        _flush(each.parent)


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
    except Exception as error:
        number = _number(error)
        if number is None or (only is not None and number not in only):
            raise
        full = number in FULL
        fix = (
            "free some space and run the same command again" if full else "check the path and its permissions"
        )
        raise UserError(
            f"cannot write ({os.strerror(number) if number else error})",
            where=str(target),
            fix=fix,
            code=ExitCode.DISK,
        ) from error


def _number(error: Exception) -> int | None:
    """The system's number of an error; safetensors' own kind of error has it in its text only. None: not the disk's."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None
