"""An adapter as PEFT's LoRA (or DoRA): the same function of the original base, in factors that everything reads.

Whatever was trained (a start that is subtracted, gates, sums of thin products) ends as B'·A' per layer, exactly.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lora_cli.adapter import peft_format
from lora_cli.adapter.delta import LowRank
from lora_cli.adapter.inject import Adapter
from lora_cli.adapter.layer import Adapted
from lora_cli.adapter.plan import WHOLE, LayerSpec, Plan
from lora_cli.parts import Part
from lora_cli.presets import Method

LOWRANK = "lowrank"
FILLED = Part(name="own")
"""The start of what is not LowRank and comes from a file: its tensors are copied in afterwards."""


@dataclass(frozen=True)
class Portable:
    """What goes into an adapter folder."""

    plan: Plan
    tensors: dict[str, Tensor]
    """By PEFT's names; contiguous, on the CPU, none sharing memory with another."""


def as_trained(adapter: Adapter) -> Portable:
    """The tensors as they are, for a method whose own are far smaller than its factors, or has none."""
    named = peft_format.on_disk(adapter)
    plan = replace(adapter.plan, method=replace(adapter.plan.method, init=FILLED))
    return Portable(plan, {key: _own(tensor) for key, tensor in named.items()})


def as_lora(adapter: Adapter) -> Portable | None:
    """LoRA that computes the same; None when ΔW of some layer is not of low rank, or its factors were forgotten."""
    if any(taken is None for taken in adapter.absorbed.values()):
        return None
    layers: dict[str, dict[str, Tensor]] = {}
    kept: dict[str, Tensor] = {}
    specs: list[LayerSpec] = []
    combined: set[str] = set()
    for spec in adapter.plan.layers:
        layer = adapter.layers[spec.name]
        found = _factors(layer, spec, adapter.absorbed.get(spec.name) or [])
        if found is None or layer.peft_name is None:
            return None
        combined.add(layer.peft_name)
        kept |= peft_format.taken(spec.name, layer.base.taken)
        layers[spec.name], thin = found
        specs.append(thin)
    assert len(combined) <= 1, "all layers of an adapter are combined in one way"
    plan = _as_lora(adapter.plan, tuple(specs), next(iter(combined), "add"))
    tensors = {
        peft_format.delta_name(name, adapter.layers[name].base, key): tensor
        for name, each in layers.items()
        for key, tensor in each.items()
    }
    moved = {f"{name}.weight" for name in adapter.absorbed}
    plan = replace(plan, also=tuple(name for name in plan.also if name not in moved), taken=bool(kept))
    tensors |= peft_format.beside(adapter, without=moved) | kept
    return Portable(plan, {key: _own(tensor) for key, tensor in tensors.items()})


def cut(adapter: Adapter, r: int) -> None:
    """Leave the first `r` components of every layer, in place, times what the scale α/r of fewer is larger by.

    Args:
        adapter: plain LoRA, as `rank: dylora` is saved.
        r: a layer that has no more keeps all of them.
    """
    layers: list[LayerSpec] = []
    for spec in adapter.plan.layers:
        delta, left = adapter.layers[spec.name].delta, min(r, spec.r)
        assert isinstance(delta, LowRank)
        delta.A = nn.Parameter(delta.A.detach()[:left], requires_grad=False)
        delta.B = nn.Parameter(delta.B.detach()[:, :left] * (spec.r / left), requires_grad=False)
        layers.append(replace(spec, r=left, alpha=spec.scale * left))
    adapter.plan = replace(adapter.plan, layers=tuple(layers))


def saved_form(adapter: Adapter) -> Portable:
    """What is saved: LoRA wherever that is exact and not much larger than what was trained."""
    if any(delta.compact for delta in adapter.deltas.values()):
        return as_trained(adapter)
    return as_lora(adapter) or (as_weights(adapter) if adapter.absorbed else as_trained(adapter))


def as_weights(adapter: Adapter) -> Portable:
    """Whole weights, W + ΔW in float32, of the layers whose W has moved further than thin factors can say."""
    plan = adapter.plan
    moved = [f"{name}.weight" for name in adapter.absorbed]
    whole = Method(name=plan.method.name, delta=Part(name=WHOLE), init=Part(name="own"))
    kept = replace(plan, method=whole, layers=(), also=tuple(dict.fromkeys([*plan.also, *moved])))
    tensors: dict[str, Tensor] = {}
    for name, layer in adapter.layers.items():
        tensors[peft_format.also_name(f"{name}.weight", ())] = layer.base.oriented(layer.merged_weight())
    beside = {
        peft_format.also_name(name, ()): p for name, p in adapter.also.items() if name not in set(moved)
    }
    beside |= {key: p for key, p in peft_format.beside(adapter).items() if key.endswith(peft_format.ROWS)}
    return Portable(kept, {key: _own(tensor) for key, tensor in (tensors | beside).items()})


def _factors(
    layer: Adapted, spec: LayerSpec, absorbed: list[tuple[Tensor, Tensor]]
) -> tuple[dict[str, Tensor], LayerSpec] | None:
    """The tensors of one layer of PEFT, and its rank and scale."""
    delta, taken = layer.delta, layer.base.taken
    own = {key: p.detach() for key, p in layer.named_parameters(recurse=False)}
    if type(delta) is LowRank and delta.fixed_A is (taken and taken[1]) and not absorbed:
        return own | {key: p.detach() for key, p in delta.trained().items()}, spec
    factors = delta.factors()
    if factors is None:
        return None
    if taken is not None:  # the first of what is fixed; it is saved for itself
        after = spec.r + taken[1].shape[0]
        factors = _without(factors[0], spec.r, after, 1), _without(factors[1], spec.r, after, 0)
    B = torch.cat([factors[0], *(B for B, _ in absorbed)], 1)
    A = torch.cat([factors[1], *(A for _, A in absorbed)], 0)
    B, A = (B, A) if delta.in_order else _without_zeros(B, A)
    shift = delta.shift()
    tensors = own | {"A": A, "B": B} | ({} if shift is None else {"bias": shift})
    r = A.shape[0]
    return tensors, replace(spec, r=r, alpha=float(r), scale=1.0)


def _without(factor: Tensor, first: int, after: int, side: int) -> Tensor:
    """A factor without some of its components."""
    count = factor.shape[side]
    return torch.cat([factor.narrow(side, 0, first), factor.narrow(side, after, count - after)], side)


def _without_zeros(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """The factors without the components that are zero, as those whose gate is closed; a layer keeps one at least."""
    kept = (B != 0).any(0) & (A != 0).any(1)
    kept[0] |= not kept.any()
    return B[:, kept], A[kept]


def _as_lora(plan: Plan, specs: tuple[LayerSpec, ...], combine: str) -> Plan:
    if specs == plan.layers and plan.method.delta.name == LOWRANK and plan.method.combine.name == combine:
        return plan
    kept = plan.method
    scale = kept.scale if kept.scale.name == "rslora" and specs == plan.layers else Part(name="alpha_over_r")
    way = Part(name=combine)
    method = Method(
        name=kept.name, base=kept.base, combine=way, scale=scale, rank=kept.rank, dropout=kept.dropout
    )
    return replace(plan, method=method, layers=specs)


def _own(tensor: Tensor) -> Tensor:
    return torch.clone(tensor.detach().cpu(), memory_format=torch.contiguous_format)
