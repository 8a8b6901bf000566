"""The tensors of safetensors files: all of them by name, and each read when it is asked for."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

KINDS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
"""Types in a safetensors header."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.dtype.itemsize


def headers(paths: Iterable[Path]) -> tuple[dict[str, Entry], dict[str, Any]]:
    """All tensors, in the order of the files, and for each the open file that holds it.

    Raises:
        ValueError: one is of a type that is not known.
        SafetensorError: a file is damaged.
        OSError: a file cannot be read.
    """
    entries: dict[str, Entry] = {}
    files: dict[str, Any] = {}
    for path in paths:
        # Not mapped: what is read through a map stays in memory, as long as the system sees fit.
        file = safe_open(path, framework="pt", backend="pread")
        for name in file.keys():  # noqa: SIM118 (not a dict)
            about = file.get_slice(name)
            kind = about.get_dtype()
            if kind not in KINDS:
                raise ValueError(f"{name} is stored as {kind}, which is not known")
            entries[name] = Entry(name, KINDS[kind], tuple(about.get_shape()))
            files[name] = file
    return entries, files
