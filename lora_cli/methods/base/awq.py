"""awq: 4 bits a weight, in even steps, as AWQ has stored them. arXiv:2306.00978

W0 = scale·(code − zero point), with a scale (float16) and a zero point for a group of inputs (mostly 128) of an
output. Such models are read, as bases that stay as they are (version gemm, of AutoAWQ), and never made. No package is
needed.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_cli.adapter import quantised
from lora_cli.adapter.grouped import Grouped, bytes_of, unpacked

BITS = 4
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word each of eight outputs is: for a kernel that takes the even and the odd ones at a time."""


class Layer(Grouped):
    """Read from int32 words of codes [in, out / 8] and of zero points [groups, out / 8]."""

    named, beside = "qweight", ("qzeros", "scales")

    def unpack(self, saved: Mapping[str, Tensor], stored: Mapping[str, Any]) -> None:
        """Take over words of eight outputs, which become bytes of two inputs."""
        out, inputs = self.out_features, self.in_features
        size = stored.get("group_size", 128)
        size = inputs if size == -1 else size
        words, zeros, scales = (saved[name] for name in ("qweight", "qzeros", "scales"))
        groups = -(-inputs // size)
        whole = (inputs, out // 8), (groups, out // 8), (groups, out)
        if out % 8 or inputs % 2 or tuple(tuple(each.shape) for each in (words, zeros, scales)) != whole:
            raise ValueError(f"codes of another shape than {out}×{inputs} in groups of {size}")
        if {words.dtype, zeros.dtype} != {torch.int32} or not scales.is_floating_point():
            raise ValueError("codes or scales of another type than int32 and a floating one")
        codes = _outputs(words).t()
        pairs = codes[:, ::2] | codes[:, 1::2] << BITS
        self.keep(BITS, pairs, scales.t(), _outputs(zeros).t(), torch.arange(inputs) // size)


wraps, View = Layer, quantised.View


def _outputs(words: Tensor) -> Tensor:
    """Numbers [..., out] in their own order."""
    return unpacked(bytes_of(words), BITS).unflatten(-1, (-1, 8))[..., PLACES].flatten(-2)


def reads(stored: Mapping[str, Any]) -> bool:
    """What AWQ stores for its gemm kernels."""
    gemm = str(stored.get("version") or stored.get("format") or "gemm").lower() == "gemm"
    known = gemm and stored.get("backend") != "llm-awq" and stored.get("bits", BITS) == BITS
    return stored.get("quant_method") == "awq" and known


def require() -> None:
    """Nothing but torch."""
