"""int4: 4 bits a weight, in even steps between the least and the largest of 32 inputs. QA-LoRA, arXiv:2309.14717

W0 = scale·code + zero point, with a scale (bfloat16) and a zero point (float32) for every 32 inputs of an output: 5.5
bits a weight in all. What is the same for these inputs is added to zero points alone (`delta: pooled`): such a model,
merged and quantised again, has the same codes and scales. Chosen by `model.quantize: int4`; no package is needed.
"""

import torch
from torch import Tensor

from lora_cli.adapter import quantised
from lora_cli.adapter.base import Base
from lora_cli.adapter.quantised import GROUP

STEPS = 15


class Layer(quantised.Quantised):
    """Codes [out, groups, 16], two to a byte; scale and zero point of every group [out, groups]."""

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def keep(self, codes: Tensor, scale: Tensor, zero: Tensor) -> None:
        """Hold them; codes are [out, groups, 32] here."""
        self.register_buffer("codes", codes[..., ::2] << 4 | codes[..., 1::2])
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """Scale times code, which float32 holds exactly, plus zero point, rounded to `dtype`."""
        pairs = self.read("codes")
        codes = torch.stack([pairs >> 4, pairs & 15], -1).flatten(-2)
        W = codes * self.read("scale").float()[..., None] + self.read("zero")[..., None]
        return W.flatten(1)[:, : self.in_features].to(dtype)


wraps, View = Layer, quantised.View


def quantise(plain: Base, W: Tensor) -> Layer:
    """W [out, in], float32 on the CPU, in the place of a plain layer.

    The least of a group has code 0 and is exact. Where the last group is short, its last weight is repeated.
    """
    made, missing = Layer(plain), -W.shape[1] % GROUP
    whole = torch.cat([W, W[:, -1:].expand(-1, missing)], 1).unflatten(1, (-1, GROUP))
    least, largest = whole.aminmax(dim=-1)
    scale = ((largest - least) / STEPS).bfloat16()
    step = scale.float().clamp(min=torch.finfo(torch.float32).tiny)
    codes = ((whole - least[..., None]) / step[..., None]).round().clamp(0, STEPS)
    made.keep(codes.to(torch.uint8), scale, least)
    return made


def require() -> None:
    """Nothing but torch."""
