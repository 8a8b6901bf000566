"""Start: what an init may look at when it fills the first ΔW of a layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_cli.adapter.base import Base

SHIFTS = ("pissa", "milora", "olora", "corda", "lora_ga", "symmetric")
"""Inits whose first B·A stands for a part of W0 that is taken off it."""


@dataclass(frozen=True)
class Start:
    """One layer before its first step."""

    base: Base
    """W0."""
    generator: torch.Generator
    """Of the CPU, so that every device starts from the same numbers."""
    statistic: Tensor | None = None
    """What the init's file says in `measures` that it needs of this layer, measured on training rows."""
