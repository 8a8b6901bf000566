"""fp8: 8 bits a weight, themselves floating-point numbers (E4M3), times a scale. arXiv:2209.05433

The scale is one for a layer, one for an output, or one for a block of mostly 128×128 (arXiv:2412.19437). Such models
are read, as bases that stay as they are (what transformers calls fp8, and float-quantized of compressed-tensors), and
never made. Inputs are never rounded. No package is needed.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_cli.adapter import quantised


class Layer(quantised.Readable):
    """Numbers [out, in], and scales of blocks [out / rows, in / columns]."""

    codes: Tensor
    scale: Tensor
    block: tuple[int, int]
    beside = ("weight_scale", "input_scale", "activation_scale")

    def unpack(self, saved: Mapping[str, Tensor], stored: Mapping[str, Any]) -> None:
        """Take over numbers and scales, which are factors in spite of the name of some."""
        shape, codes = (self.out_features, self.in_features), saved["weight"]
        scale = saved["weight_scale_inv"] if "weight_scale_inv" in saved else saved["weight_scale"]
        if codes.shape != shape or codes.dtype != torch.float8_e4m3fn:
            raise ValueError(f"codes of another shape than {shape[0]}×{shape[1]}, or not of E4M3")
        if not scale.is_floating_point():
            raise ValueError("scales that are no floating-point numbers")
        found = next((each for each in _blocks(shape, stored) if _fits(scale, shape, each)), None)
        if found is None:
            raise ValueError(f"scales of another shape than {shape[0]}×{shape[1]} asks for")
        self.block = found
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scale", scale.reshape([-(-n // k) for n, k in zip(shape, found, strict=True)]))

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """Number times scale in float32, rounded to `dtype`."""
        codes, scale = self.read("codes").float(), self.read("scale").float()
        for axis, block in enumerate(self.block):
            if scale.shape[axis] > 1:
                scale = scale.repeat_interleave(block, axis).narrow(axis, 0, codes.shape[axis])
        return codes.mul_(scale).to(dtype)


wraps, View = Layer, quantised.View


def _blocks(shape: tuple[int, int], stored: Mapping[str, Any]) -> list[tuple[int, int]]:
    """What a scale may be for: what the config says, the whole layer, or an output."""
    said = stored.get("weight_block_size") or _weights(stored).get("block_structure")
    return [*([tuple(said)] if said else []), shape, (1, shape[1])]


def _fits(scale: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> bool:
    grid = tuple(-(-n // k) for n, k in zip(shape, block, strict=True))
    return tuple(scale.shape) == grid or (block[1] == shape[1] and scale.numel() == grid[0])


def _weights(stored: Mapping[str, Any]) -> Mapping[str, Any]:
    """What compressed-tensors says of weights, if it says the same of all; nothing elsewhere."""
    groups = stored.get("config_groups")
    each = groups.values() if isinstance(groups, Mapping) else ()
    found = [group.get("weights") or {} if isinstance(group, Mapping) else {} for group in each]
    return found[0] if found and all(each == found[0] for each in found) else {}


def reads(stored: Mapping[str, Any]) -> bool:
    """What transformers itself stores, or compressed-tensors with scales alone."""
    if stored.get("quant_method") == "compressed-tensors":
        weights = _weights(stored)
        even = weights.get("strategy") in ("tensor", "channel", "block") and weights.get("symmetric", True)
        floats = (weights.get("type"), weights.get("num_bits")) == ("float", 8)
        turned = bool(stored.get("transform_config"))  # inputs would have to be, too
        return stored.get("format") == "float-quantized" and floats and even and not turned
    return stored.get("quant_method") == "fp8" and stored.get("expert_dtype", "fp8") == "fp8"


def require() -> None:
    """Nothing but torch."""
