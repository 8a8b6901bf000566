"""nf4: 4 bits a weight, in levels that are equally often used by normal weights. QLoRA, arXiv:2305.14314

Every 64 weights share a largest value, which is kept in 8 bits: 4.127 bits a weight in all. Through bitsandbytes, to
the codes that it makes itself. Chosen by `model.quantize: nf4`; every linear layer but the output head is quantised,
after the start of A and B.
"""

import logging
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lora_cli.adapter import quantised
from lora_cli.adapter.base import Base
from lora_cli.errors import ExitCode, UserError

BLOCK, OUTER = 64, 256
"""Weights that share a largest value; largest values that share one."""


class Layer(quantised.Readable):
    """Codes, two to a byte; per block a largest value in 8 bits, and of these again one in 32."""

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_levels: Tensor | None
    offset: Tensor | None
    block, levels = BLOCK, "nf4"
    beside = ("weight.",)

    def keep(self, codes: Tensor, absmax: Tensor, nested: Any = None, offset: Tensor | None = None) -> None:
        """Hold the codes of whole blocks, and how their largest values are quantised in turn, if they are."""
        whole = absmax.numel() * self.block // 2
        self.register_buffer("codes", functional.pad(codes.detach().flatten(), (0, whole - codes.numel())))
        self.register_buffer("absmax", absmax)
        self.register_buffer("nested_absmax", nested and nested.absmax)
        self.register_buffer("nested_levels", nested and nested.code)
        self.register_buffer("offset", offset)

    def unpack(self, saved: Mapping[str, Tensor], stored: Mapping[str, Any]) -> None:
        """Take over codes, which may be in the levels of fp4, and a state of which some is JSON in a tensor."""
        about = {name.removeprefix("weight."): tensor for name, tensor in saved.items() if name != "weight"}
        try:
            state = _bitsandbytes().QuantState.from_dict(about, torch.device("cpu"))
        except Exception as error:  # foreign files: it fails in many ways
            raise ValueError(f"no state of 4-bit codes: {str(error) or type(error).__name__}") from error
        if tuple(state.shape or ()) != (self.out_features, self.in_features) or not _is_whole(
            saved["weight"], state
        ):
            raise ValueError(f"codes of another shape than {self.out_features}×{self.in_features}")
        self.block, self.levels = state.blocksize, state.quant_type
        # Bytes, whatever type they lie in: FSDP wants that of the other weights.
        self.keep(saved["weight"].contiguous().view(torch.uint8), state.absmax, state.state2, state.offset)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """Level times largest value, rounded to `dtype` once.

        As a matrix of one block a row: on a CPU bitsandbytes 0.50 takes the wrong largest values where a row of W does
        not end with a block.
        """
        bnb = _bitsandbytes()
        state: Any = bnb.QuantState
        codes, absmax = self.read("codes"), self.read("absmax")
        shape = torch.Size((absmax.numel(), self.block))
        kept = {"shape": shape, "blocksize": self.block, "quant_type": self.levels, "dtype": dtype}
        if self.nested_absmax is not None:
            levels = self.read("nested_levels")
            nested = state(self.read("nested_absmax"), code=levels, blocksize=OUTER, dtype=torch.float32)
            kept |= {"offset": self.offset, "state2": nested}
        found: Tensor = bnb.dequantize_4bit(codes[:, None], state(absmax, **kept))
        return found.flatten()[: self.out_features * self.in_features].view(self.out_features, -1)


wraps, View = Layer, quantised.View


def _is_whole(codes: Tensor, state: Any) -> bool:
    """Whether there are as many codes and largest values, of both kinds, as the shape asks for."""
    numbers, nested = state.shape.numel(), state.state2
    most = numbers + state.blocksize
    if not numbers <= 2 * codes.numel() * codes.element_size() < most:
        return False
    if not numbers <= state.absmax.numel() * state.blocksize < most:
        return False
    if nested is None:
        return state.absmax.dtype == torch.float32
    blocks, held = state.absmax.numel(), nested.absmax.numel() * OUTER
    levels = nested.code.numel() == 256 and state.absmax.dtype == torch.uint8
    return nested.blocksize == OUTER and blocks <= held < blocks + OUTER and levels


def reads(stored: Mapping[str, Any]) -> bool:
    """What bitsandbytes stores in 4 bits."""
    return stored.get("quant_method") == "bitsandbytes" and bool(stored.get("load_in_4bit"))


def quantise(plain: Base, W: Tensor) -> Layer:
    """W [out, in], float32 on the CPU, in the place of a plain layer.

    The mean of the largest values is taken in float64: as bitsandbytes takes it, it depends on the number of threads
    in its last bit, and everything else on it.
    """
    bnb, made = _bitsandbytes(), Layer(plain)
    codes, state = bnb.quantize_4bit(W.contiguous(), blocksize=BLOCK, quant_type="nf4")
    offset = state.absmax.double().mean().float()
    absmax, nested = bnb.quantize_blockwise(state.absmax - offset, blocksize=OUTER)
    made.keep(codes, absmax, nested, offset)
    return made


@cache
def _bitsandbytes() -> Any:
    """Imported with the first weight that is quantised, and without what it has to say of kernels it does not find."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes.functional as found

    return found


def require() -> None:
    """Say what is missing, before anything is loaded.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        what, fix = "nf4 needs bitsandbytes, which is not installed", "pip install 'lora-cli[quant]'"
        raise UserError(what, where="model.quantize", fix=fix, code=ExitCode.MODEL)
