"""A disk that is full."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from scripts.faults.lab import SAME, Finding, Lab, tally

ENOUGH = 64 * 2**20
"""Bytes."""


def full_disk(lab: Lab, system: str) -> Finding:
    """P6: a disk that is full somewhere on the way; then there is space again, and the same command is run again.

    The sizes of the disk are spread over what the undisturbed run fills.
    """
    folder = lab.folder / "small"
    task = replace(lab.task(), out=str(folder / "run"))
    lab.undisturbed(system, lab.task())
    with _mounted(folder, ENOUGH):
        lab.run(system, task, "P6 enough")
        needed = shutil.disk_usage(folder).used
    tries, happened, ended = lab.draws(10, 60), [], 0
    for number in range(tries):
        size = int(needed * (0.2 + 0.75 * (number + 0.5) / tries))
        with _mounted(folder, size):
            first = lab.run(system, task, f"P6 {size} bytes")
            ended += first.code != 0
            _mount("remount,", folder, ENOUGH)
            happened.append(lab.judged(system, task, lab.run(system, task, "P6 again")))
    found = tally("P6", system, happened, {SAME})
    said = f"{found.said}; {ended} of {tries} runs had ended at the full disk"
    return Finding("P6", system, found.tried, found.ok, said)


@contextmanager
def _mounted(folder: Path, size: int) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    _mount("", folder, size)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _mount(how: str, folder: Path, size: int) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"{how}size={size}", "tmpfs", str(folder)], check=True)
