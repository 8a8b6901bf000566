"""How many are left, and which: a number that falls along a cubic, and the most important of a vector. arXiv:2303.10512

Shared by everything that prunes on the way: components of ΔW, entries of its factors, tensors that train.
"""

import math

import torch
from torch import Tensor


def left(step: int, begin: int, end: int) -> float:
    """What is still there, of all that is to go: 1 until step `begin`, 0 from `end` on, (1 − t)³ between."""
    if step >= end:
        return 0.0
    if step <= begin:
        return 1.0
    return (1 - (step - begin) / (end - begin)) ** 3


def more(r: int, factor: float) -> int:
    """Components at the start of a layer that is to keep `r`."""
    return max(math.ceil(factor * r), r)


def kept(first: int, factor: float) -> int:
    """What `more` was asked for when it gave `first`."""
    return max(
        math.floor(first / factor + 1e-9), 1
    )  # 81 / 1.35 is 60, and 59.999 as numbers in a machine are


def largest(scores: Tensor, count: int) -> Tensor:
    """Which entries of a vector are its `count` largest: exactly so many, of equal ones the first."""
    chosen = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    chosen[torch.argsort(scores, descending=True, stable=True)[:count]] = True
    return chosen
