"""Only kernels that give the same bits each time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exactly(wanted: bool) -> Iterator[None]:
    """Inside the block PyTorch takes deterministic kernels, and fails where it has none.

    cuBLAS needs a workspace of a fixed size for it, and looks for it when it is first used.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
