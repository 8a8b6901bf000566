"""gptq: 2, 3, 4 or 8 bits a weight, in even steps, as GPTQ has stored them. arXiv:2210.17323

W0 = scale·(code − zero point), with a scale (mostly float16) and a zero point for a group of inputs (mostly 128) of an
output; with act-order `g_idx` says which inputs those are. Such models are read, as bases that stay as they are
(checkpoint formats gptq and gptq_v2, of AutoGPTQ and GPTQModel), and never made. No package is needed.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_cli.adapter import quantised
from lora_cli.adapter.grouped import Grouped, bytes_of, unpacked

BITS = (2, 3, 4, 8)
WORD = 32


class Layer(Grouped):
    """Read from int32 words of codes [in·bits / 32, out] and of zero points [groups, out·bits / 32]."""

    named, beside = "qweight", ("qzeros", "scales", "g_idx")

    def unpack(self, saved: Mapping[str, Tensor], stored: Mapping[str, Any]) -> None:
        """Take over words, in which numbers lie one behind the other, the lowest bit first."""
        bits, size, (out, inputs) = (
            stored["bits"],
            stored["group_size"],
            (self.out_features, self.in_features),
        )
        codes, zeros, scales = (saved[name] for name in ("qweight", "qzeros", "scales"))
        in_line = in_order(inputs, size)
        group = saved.get("g_idx", in_line)
        whole = (_words(inputs, bits), out), (len(scales), _words(out, bits)), (len(scales), out), (inputs,)
        if tuple(tuple(each.shape) for each in (codes, zeros, scales, group)) != whole:
            raise ValueError(f"codes of another shape than {out}×{inputs} in {bits} bits")
        if {codes.dtype, zeros.dtype} != {torch.int32} or not scales.is_floating_point():
            raise ValueError("codes or scales of another type than int32 and a floating one")
        uneven = group is in_line and int(group.max()) + 1 != len(scales)
        if group.min() < 0 or group.max() >= len(scales) or uneven:
            raise ValueError(f"inputs in other groups than the {len(scales)} that there are")
        zero = _zeros(zeros, bits, less_one=_form(stored) == "gptq")[:, :out]
        self.keep(bits, bytes_of(codes.t()), scales.t(), zero.t(), group)


wraps, View = Layer, quantised.View


def in_order(inputs: int, size: int) -> Tensor:
    """The group of each input where they are one behind the other; -1: all are one."""
    return torch.arange(inputs) // (inputs if size == -1 else size)


def _words(numbers: int, bits: int) -> int:
    return -(-numbers * bits // WORD)


def _zeros(words: Tensor, bits: int, less_one: bool) -> Tensor:
    """Zero points [groups, ...]; the older format has each less one, taken off words, where a borrow goes on.

    Of 3 bits, which words do not hold a whole number of, each by itself.
    """
    if bits == 3:
        return (unpacked(bytes_of(words), bits) + less_one) & 7
    ones = sum(1 << start for start in range(0, WORD, bits))
    return unpacked(bytes_of(words + less_one * ones), bits)


def _form(stored: Mapping[str, Any]) -> str:
    return str(stored.get("checkpoint_format") or stored.get("format") or "gptq")


def reads(stored: Mapping[str, Any]) -> bool:
    """What GPTQ stores in the order of its first programs."""
    known = stored.get("bits") in BITS and _form(stored) in ("gptq", "gptq_v2")
    return stored.get("quant_method") == "gptq" and known


def require() -> None:
    """Nothing but torch."""
