"""Grouped: codes of 2, 3, 4 or 8 bits, in even steps from a zero point, both for a group of inputs of an output."""

from math import gcd

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_cli.adapter.quantised import Readable


class Grouped(Readable):
    """W0 = scale·(code − zero), what GPTQ and AWQ store; their words are put in the order of W0's rows, bit for bit."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group: Tensor | None
    bits: int

    def keep(self, bits: int, codes: Tensor, scale: Tensor, zero: Tensor, group: Tensor) -> None:
        """Hold them.

        Args:
            bits: of a code.
            codes: bytes [out, ...], a stream of bits in each row; what is behind the last input is not read.
            scale: [out, groups].
            zero: [out, groups], unsigned bytes.
            group: [in], the group of each input. It is held only where they are not as many, one after the other.
        """
        self.bits = bits
        in_order = torch.arange(self.in_features) * scale.shape[1] // self.in_features
        even = self.in_features % scale.shape[1] == 0 and torch.equal(group.long(), in_order)
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scale", scale.contiguous())
        self.register_buffer("zero", zero.contiguous())
        self.register_buffer("group", None if even else group.to(torch.int32))

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """Scale times code less zero, which float32 holds exactly (a scale of 16 bits), rounded to `dtype` once."""
        codes = unpacked(self.read("codes"), self.bits)[:, : self.in_features].float()
        scale, zero = self.read("scale").float(), self.read("zero").float()
        if self.group is not None:
            group = self.read("group").long()
            return (codes.sub_(zero[:, group]).mul_(scale[:, group])).to(dtype)
        grouped = codes.unflatten(1, (scale.shape[1], -1))
        return grouped.sub_(zero[..., None]).mul_(scale[..., None]).flatten(1).to(dtype)


def unpacked(stream: Tensor, bits: int) -> Tensor:
    """The numbers in rows of bytes [..., n], the lowest bit first: unsigned bytes, [..., 8·n / bits] at least."""
    period = bits // gcd(bits, 8)  # bytes, after which a number begins with one again
    if missing := -stream.shape[-1] % period:
        stream = F.pad(stream, (0, missing))
    stream = stream.unflatten(-1, (-1, period))
    found: list[Tensor] = []
    for start in range(0, 8 * period, bits):
        byte, shift = divmod(start, 8)
        number = stream[..., byte] >> shift
        if shift + bits > 8:
            number = number | stream[..., byte + 1] << 8 - shift
        found.append(number & (1 << bits) - 1)
    return torch.stack(found, -1).flatten(-2)


def bytes_of(words: Tensor) -> Tensor:
    """The bytes of rows of words, the lowest of each first."""
    return words.contiguous().view(torch.uint8)
