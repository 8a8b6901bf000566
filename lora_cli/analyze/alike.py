"""Blocks that are alike cost alike: which of them have to be looked at for all to be known.

What a block adds depends on what it is and on what it follows, so of a word of blocks that comes again and again (one
block in most models, six in Gemma 3) four copies are kept: the first two, the last, and one between them that stands
for all others. Two, because what a block has read is let go of only in the next one, where nothing is kept.
"""

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from torch import nn

NUMBERS = {"layer_idx", "name"}
"""Attributes that tell modules apart which are otherwise the same."""


def looks(block: nn.Module, kind: Hashable) -> Hashable:
    """What the cost of a block depends on: its modules and their settings, its parameters, what its model calls it.

    A setting that nobody knows of makes blocks differ that do not, which takes longer and is right all the same.
    """
    modules = tuple((name, type(module), tuple(_settings(module))) for name, module in block.named_modules())
    parameters = tuple((n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in block.named_parameters())
    return kind, modules, parameters


def _settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for key, value in vars(module).items():
        if isinstance(value, bool | int | float | str | None) and key not in NUMBERS:
            yield key, value


def stand_ins(kinds: Sequence[Hashable]) -> list[int]:
    """For each of a row of blocks the one that stands for it, itself or another one."""
    stand_in = list(range(len(kinds)))
    left = list(stand_in)
    width = 1
    while 5 * width <= len(left):
        at = _again(kinds, left, width)
        if at is None:
            width += 1
            continue
        # The fourth of five copies is dropped: what was there is as in the third.
        third, fourth = left[at + 2 * width : at + 3 * width], left[at + 3 * width : at + 4 * width]
        other = dict(zip(fourth, third, strict=True))
        stand_in = [other.get(index, index) for index in stand_in]
        del left[at + 3 * width : at + 4 * width]
    return stand_in


def _again(kinds: Sequence[Hashable], left: Sequence[int], width: int) -> int | None:
    """Where five copies of a word of this width begin, one behind the other."""
    same = [kinds[a] == kinds[b] for a, b in zip(left, left[width:], strict=False)]
    run = 0
    for at, each in enumerate(same):
        run = run + 1 if each else 0
        if run == 4 * width:
            return at + 1 - run
    return None
