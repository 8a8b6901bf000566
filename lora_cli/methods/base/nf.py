"""nf: NormalFloat of 2, 3, 4 or 8 bits in blocks of 16, 32 or 64, another for each layer. LQ-LoRA, arXiv:2311.12023

The levels are quantiles of the normal distribution, from -1 to 1 with 0 among them. The weights of a block share a
largest value, kept in 8 bits: what it has over the least one, in even steps up to that of the largest of 256. Chosen
by `model.quantize: nf`; no package is needed. With `model.bits` each layer gets bits and blocks of its own, such that
the squared errors of all layers sum up to the least that so many bits a weight allow; without, all have 4 bits and
blocks of 64, as nf4 (4.13 bits a weight).
"""

from collections.abc import Iterator
from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor
from torch.nn import functional

from lora_cli.adapter import quantised
from lora_cli.adapter.base import Base

FORMATS = tuple({"bits": bits, "block": block} for bits in (2, 3, 4, 8) for block in (64, 32, 16))
"""What a layer may have."""
TAIL = (1 / 30 + 1 / 32) / 2
"""Share of the normal distribution beyond the outermost levels, whatever the bits."""
STEPS, OUTER = 255, 256
"""Between the least and the largest value of a group of blocks; blocks in such a group."""


class Layer(quantised.Quantised):
    """Codes, packed; of each block how many steps its largest value is above the least; of each group a step."""

    codes: Tensor
    above: Tensor
    step: Tensor
    least: Tensor
    bits: int
    block: int

    def keep(self, codes: Tensor, above: Tensor, step: Tensor, least: Tensor) -> None:
        """Hold them; what has rows to share out first, as where it is shared out."""
        self.register_buffer("codes", codes)
        self.register_buffer("above", above)
        self.register_buffer("step", step)
        self.register_buffer("least", least)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """Level times largest value, which float32 rounds alike everywhere, rounded to `dtype`."""
        codes = unpacked(self.read("codes"), self.bits)
        largest = _largest(self.read("above"), self.read("step"), self.least)
        W = levels(self.bits).to(codes.device)[codes.int()].view(-1, self.block) * largest[:, None]
        return W.flatten()[: self.out_features * self.in_features].view(self.out_features, -1).to(dtype)


wraps, View = Layer, quantised.View


@cache
def levels(bits: int) -> Tensor:
    """2^bits of them, float32, rising: as many quantiles below 0 as above, less one."""
    half = 2 ** (bits - 1)
    below = [TAIL + (0.5 - TAIL) * i / (half - 1) for i in range(half - 1)]
    above = [0.5 + (0.5 - TAIL) * i / half for i in range(half + 1)]
    quantile = NormalDist().inv_cdf
    return torch.tensor([quantile(share) / quantile(1 - TAIL) for share in (*below, *above)])


def packed(codes: Tensor, bits: int) -> Tensor:
    """Codes [n], n a multiple of 8, without gaps: of 3 bits the upper two, four to a byte, then the lowest, eight."""
    found: list[Tensor] = []
    for width, below in _digits(bits):
        digits = (codes >> below & 2**width - 1).view(-1, 8 // width)
        found.append((digits << _places(width, codes)).sum(1, dtype=torch.uint8))
    return torch.cat(found)


def unpacked(kept: Tensor, bits: int) -> Tensor:
    """The codes again, uint8."""
    count = 8 * kept.numel() // bits
    codes = kept.new_zeros(count)
    for width, below in _digits(bits):
        part, kept = kept.split([count * width // 8, kept.numel() - count * width // 8])
        codes |= (part[:, None] >> _places(width, part) & 2**width - 1).flatten() << below
    return codes


def _digits(bits: int) -> Iterator[tuple[int, int]]:
    """Powers of two that make up `bits`, and how many bits are below each of them."""
    return ((width, bits & width - 1) for width in (8, 4, 2, 1) if bits & width)


def _places(width: int, like: Tensor) -> Tensor:
    """Where in a byte digits of so many bits begin."""
    return torch.arange(0, 8, width, dtype=torch.uint8, device=like.device)


def bits_of(numbers: int, bits: int, block: int) -> int:
    """What so many weights take, all included."""
    blocks = -(-numbers // block)
    return blocks * (block * bits + 8) + 32 * (-(-blocks // OUTER) + 1)


def quantise(plain: Base, W: Tensor, bits: int = 4, block: int = 64) -> Layer:
    """W [out, in], float32 on the CPU, in the place of a plain layer; the nearest levels times what is kept of a block.

    No sum is taken, so that no order of one can change a bit.
    """
    made, tiny = Layer(plain), torch.finfo(torch.float32).tiny
    made.bits, made.block = bits, block
    blocks = functional.pad(W.flatten(), (0, -W.numel() % block)).view(-1, block)
    largest = blocks.abs().amax(1)
    over = largest - largest.min()
    groups = functional.pad(over, (0, -len(over) % OUTER)).view(-1, OUTER)
    step = groups.amax(1) / STEPS
    above = (groups / step.clamp(min=tiny)[:, None]).round().flatten()[: len(over)].to(torch.uint8)
    kept = _largest(above, step, largest.min())
    between = (levels(bits)[:-1] + levels(bits)[1:]) / 2
    codes = torch.bucketize(blocks / kept.clamp(min=tiny)[:, None], between, out_int32=True)
    made.keep(packed(codes.flatten().to(torch.uint8), bits), above, step, largest.min())
    return made


def _largest(above: Tensor, step: Tensor, least: Tensor) -> Tensor:
    """The largest value of each block, float32, as it is kept."""
    return step.repeat_interleave(OUTER)[: len(above)] * above + least


def require() -> None:
    """Nothing but torch."""
