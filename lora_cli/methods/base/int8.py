"""int8: 8 bits a weight, each row scaled to ±127 by its largest. LLM.int8(), arXiv:2208.07339

The codes are those of bitsandbytes; inputs are never quantised, so that a layer computes what its weight says, and
no package is needed. Chosen by `model.quantize: int8`: twice the memory of nf4, a tenth of its error.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_cli.adapter import quantised
from lora_cli.adapter.base import Base

LARGEST = 127


class Layer(quantised.Readable):
    """Codes [out, in], and the largest value of each row [out]."""

    codes: Tensor
    absmax: Tensor
    beside = ("SCB", "weight_format")

    def keep(self, codes: Tensor, absmax: Tensor) -> None:
        """Hold them, row by row: where they are shared out, each process has some rows."""
        self.register_buffer("codes", codes.detach().contiguous())
        self.register_buffer("absmax", absmax.detach().float())

    def unpack(self, saved: Mapping[str, Tensor], stored: Mapping[str, Any]) -> None:
        """Take over codes row by row, the only order that bitsandbytes still writes."""
        codes, absmax, order = saved["weight"], saved["SCB"], saved.get("weight_format")
        shape = (self.out_features, self.in_features)
        if codes.shape != shape or codes.dtype != torch.int8 or absmax.shape != shape[:1]:
            raise ValueError(f"codes of another shape than {self.out_features}×{self.in_features}")
        if order is not None and order.any():
            raise ValueError("codes in an order that is not read any more")
        self.keep(codes, absmax)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """Code times a 127th of the row's largest value, rounded to `dtype` once."""
        return (self.read("codes") * (self.read("absmax") / LARGEST)[:, None]).to(dtype)


wraps, View = Layer, quantised.View


def reads(stored: Mapping[str, Any]) -> bool:
    """What bitsandbytes stores in 8 bits."""
    return stored.get("quant_method") == "bitsandbytes" and bool(stored.get("load_in_8bit"))


def quantise(plain: Base, W: Tensor) -> Layer:
    """W [out, in], float32 on the CPU, in the place of a plain layer."""
    made, absmax = Layer(plain), W.abs().amax(1)
    scaled = W * (LARGEST / absmax.clamp(min=torch.finfo(torch.float32).tiny))[:, None]
    made.keep(scaled.round().to(torch.int8), absmax)
    return made


def require() -> None:
    """Nothing but torch."""
