"""Evaluation leaves no trace: every module's mode is put back, whatever happens."""

from collections.abc import Generator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from lora_cli.model import computing


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Inside the block no dropout and no gradients; afterwards every module has the mode it had.

    The caller may have chosen a precision by autocast; else the model computes in what it is stored in.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        chosen = torch.is_autocast_enabled(next(model.parameters()).device.type)
        with torch.no_grad(), nullcontext() if chosen else computing(model):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
