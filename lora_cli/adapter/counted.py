"""Uniform random numbers that are a function of (seed, count): integer arithmetic alone, so every device has the same.

SplitMix64 (Steele, Lea and Flood 2014): the count, spread by the golden ratio, goes through a mixing function.
"""

import torch
from torch import Tensor


def _signed(number: int) -> int:
    """The int64 with these 64 bits."""
    return number - 2**64 if number >= 2**63 else number


GOLDEN, FIRST, SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def uniform(seed: int, begin: int, end: int, device: torch.device) -> Tensor:
    """Numbers `begin` to `end` − 1 of the sequence, from [−1, 1), float32 and exact: multiples of 2⁻²³."""
    bits = torch.arange(begin + 1, end + 1, device=device).mul_(GOLDEN).add_(seed)
    bits = _folded(bits, 30).mul_(FIRST)
    bits = _folded(bits, 27).mul_(SECOND)
    return (_shifted(_folded(bits, 31), 40)).float().mul_(2.0**-23).sub_(1.0)


def _folded(bits: Tensor, by: int) -> Tensor:
    return bits ^ _shifted(bits, by)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """To the right, filled with zeros: of a signed number torch repeats the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)
