"""Evaluation leaves no trace: every module's mode is put back, whatever happens."""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Inside the block no dropout and no gradients; afterwards every module has the mode it had."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
