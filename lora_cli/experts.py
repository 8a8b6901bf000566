"""Mixtures of experts, taken apart: a plain linear layer for each matrix of each expert, and put together again.

transformers keeps the weights of all experts in one tensor [experts, out, in], which is no layer that could be adapted.
Apart, they are slices of it, not copies; a forward pass goes through one expert after the other.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_cli.methods.base.expert import ExpertLinear

MATRICES = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Place:
    """Where a parameter of one expert is among those of the fused module."""

    fused: str
    """Name of the fused parameter [experts, ...]."""
    expert: int
    transposed: bool
    """Whether it lies there as [in, out]."""

    def turned(self, part: Tensor) -> Tensor:
        """What the fused parameter has of the expert -> the expert's own, and the other way round."""
        return part.t().contiguous() if self.transposed else part


def split(model: nn.Module) -> int:
    """Take the mixtures in a model apart, in place; return how many there were."""
    fused = [(name, module) for name, module in model.named_modules() if _is_fused(module)]
    for name, module in fused:
        model.set_submodule(name, SplitExperts(module))
    return len(fused)


def join(model: nn.Module) -> None:
    """Put them together again, with the weights that they have now."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SplitExperts):
            model.set_submodule(name, module.joined())


def places(model: nn.Module) -> dict[str, Place]:
    """Parameter of an expert -> its place, of all mixtures of a model that were taken apart; expert by expert."""
    found: dict[str, Place] = {}
    for name, module in model.named_modules():
        if isinstance(module, SplitExperts):
            for number, _ in enumerate(module):
                for matrix in MATRICES:
                    own, fused = f"{name}.{number}.{matrix}", f"{name}.{matrix}"
                    found[f"{own}.weight"] = Place(fused, number, module.is_transposed)
                    if module.has_bias:
                        found[f"{own}.bias"] = Place(f"{fused}_bias", number, False)
    return found


class Expert(nn.Module):
    """One expert: gate_up_proj [2·hidden, in] and down_proj [out, hidden]."""

    def __init__(self, fused: Any, number: int) -> None:
        """Slices of the fused weights."""
        super().__init__()
        self.gate_up_proj, self.down_proj = (_slice(fused, matrix, number) for matrix in MATRICES)


class SplitExperts(nn.ModuleList):
    """The experts of one block, in place of the fused module, which is kept without its weights."""

    def __init__(self, fused: Any) -> None:
        """Nothing is copied."""
        super().__init__(Expert(fused, number) for number in range(fused.num_experts))
        shell = copy.copy(fused)
        shell._parameters = dict.fromkeys(fused._parameters)
        self._shell = [shell]  # in a list, so that nn.ModuleList does not take it for an expert

    @property
    def is_transposed(self) -> bool:
        """Whether the fused weights are [experts, in, out]."""
        return self._shell[0].is_transposed

    @property
    def has_bias(self) -> bool:
        """Whether each matrix has one."""
        return self._shell[0].has_bias

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Sum of what the chosen experts [tokens, k] make of x [tokens, in], by their weights [tokens, k].

        An expert that no token chose computes on none, so that its tensors have a gradient, which is zero.
        """
        y = torch.zeros_like(x)
        expert: Any
        for number, expert in enumerate(self):
            token, place = torch.where(chosen == number)
            hidden = self._shell[0]._apply_gate(expert.gate_up_proj(x[token]))
            out = expert.down_proj(hidden) * weights[token, place, None]
            y = y.index_add(0, token, out.to(y.dtype))
        return y

    def joined(self) -> nn.Module:
        """The fused module, with these weights."""
        fused = copy.copy(self._shell[0])
        fused._parameters = {}
        for matrix in MATRICES:
            layers: list[Any] = [expert.get_submodule(matrix) for expert in self]
            stacked = torch.stack([layer.weight.detach() for layer in layers])
            stacked = stacked.mT.contiguous() if fused.is_transposed else stacked
            setattr(fused, matrix, nn.Parameter(stacked, requires_grad=False))
            if fused.has_bias:
                biases = torch.stack([layer.bias.detach() for layer in layers])
                setattr(fused, f"{matrix}_bias", nn.Parameter(biases, requires_grad=False))
        return fused


def _is_fused(module: nn.Module) -> bool:
    """Whether its forward is the one that transformers describes for fused experts, with a gate."""
    parameters = dict(module.named_parameters(recurse=False))
    known = {*MATRICES, *(f"{matrix}_bias" for matrix in MATRICES)}
    described = all(
        hasattr(module, key) for key in ("is_transposed", "has_bias", "num_experts", "_apply_gate")
    )
    plain = getattr(module, "has_gate", False) and not getattr(module, "has_post_expert_norm", False)
    return described and plain and set(MATRICES) <= parameters.keys() <= known


def _slice(fused: Any, matrix: str, number: int) -> ExpertLinear:
    weight = getattr(fused, matrix)[number]
    weight = weight.t() if fused.is_transposed else weight
    bias = getattr(fused, f"{matrix}_bias")[number] if fused.has_bias else None
    return ExpertLinear(weight.detach(), None if bias is None else bias.detach())
