"""Another rank for a layer while it trains: its A and B give way to others, for model, optimizer and plan alike."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_cli import parts
from lora_cli.adapter.delta import LowRank, Place
from lora_cli.adapter.start import Start

if TYPE_CHECKING:
    from lora_cli.adapter.inject import Adapter


def fresh(adapter: "Adapter", name: str, r: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A, B and the bias, if there is one, of `r` new components of a layer, as the method's init starts them: B·A = 0.

    Args:
        adapter: that of the run; its init needs no measurements.
        name: of the layer.
        r: how many; the scale is that of the others.
        generator: of the CPU.
    """
    layer, init = adapter.layers[name], adapter.plan.method.init
    old = layer.delta
    assert isinstance(old, LowRank)
    delta = LowRank(Place(layer.base, r, old.scale, bias=old.bias is not None))
    with torch.no_grad():
        parts.load("init", init.name).init(
            delta, Start(layer.base, generator), **parts.settings("init", init)
        )
    return {key: p.detach().to(layer.base.device) for key, p in delta.named_parameters()}


def put(adapter: "Adapter", name: str, tensors: Mapping[str, Tensor], optimizer: Optimizer) -> None:
    """Replace tensors of a layer's ΔW by others, which train where those did; the optimizer starts anew on them.

    The layer's scale stays what it is.
    """
    delta = adapter.deltas[name]
    assert isinstance(delta, LowRank)
    more = 0
    for key, tensor in tensors.items():
        old = delta.get_parameter(key)
        new = nn.Parameter(tensor.detach().clone(), old.requires_grad)
        for group in optimizer.param_groups:
            group["params"] = [new if each is old else each for each in group["params"]]
        optimizer.state.pop(old, None)
        setattr(delta, key, new)
        more += (new.numel() - old.numel()) * old.requires_grad
    layers = (
        replace(spec, r=len(delta.A), num_trainable=spec.num_trainable + more) if spec.name == name else spec
        for spec in adapter.plan.layers
    )
    adapter.plan = replace(adapter.plan, layers=tuple(layers))


def put_empty(adapter: "Adapter", ranks: Mapping[str, int], optimizer: Optimizer) -> None:
    """Give layers A and B of these ranks, all zero, wherever theirs is another: they are about to be filled."""
    for name, r in ranks.items():
        delta = adapter.deltas[name]
        assert isinstance(delta, LowRank)
        if len(delta.A) != r:
            empty = {"A": delta.A.new_zeros(r, delta.A.shape[1]), "B": delta.B.new_zeros(len(delta.B), r)}
            put(adapter, name, empty, optimizer)
