"""Adapters of experts that were taken apart <-> PEFT's `target_parameters`, which has those of a block in one tensor.

base_model.model.<experts>.lora_A.weight [E·r, in], expert by expert, and .lora_B.weight [out, r·E], the experts beside
one another in every column; of the first of two matrices with `.base_layer` in it.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lora_cli.adapter.plan import LayerSpec, Plan, view_of

KIND = "expert"
"""The base of a matrix of one expert."""
FIRST, SECOND = "gate_up_proj", "down_proj"
NAME = re.compile(rf"(?P<block>.+)\.(?P<number>\d+)\.(?P<matrix>{FIRST}|{SECOND})")
A, B = "lora_A.weight", "lora_B.weight"


def adapted(plan: Plan) -> list[LayerSpec]:
    """The matrices of experts among the layers."""
    return [spec for spec in plan.layers if spec.base == KIND]


def parameters(plan: Plan) -> dict[str, list[LayerSpec]]:
    """Name of the fused tensor -> the layers that it was taken apart into, in their order."""
    found: dict[str, dict[int, LayerSpec]] = {}
    for spec in adapted(plan):
        name = NAME.fullmatch(spec.name)
        assert name is not None, "experts are taken apart under these names"
        found.setdefault(f"{name['block']}.{name['matrix']}", {})[int(name["number"])] = spec
    return {name: [specs[number] for number in sorted(specs)] for name, specs in found.items()}


def are_apart(plan: Plan, model: nn.Module) -> bool:
    """Whether matrices of single experts are adapted, or trained in full."""
    owners = {name.rpartition(".")[0] for name in plan.also}
    kinds = (view_of(model.get_submodule(owner)) for owner in owners)
    return bool(adapted(plan)) or any(kind is not None and kind[0] == KIND for kind in kinds)


def fits(plan: Plan, model: nn.Module) -> bool:
    """Whether PEFT can say it: all experts of a block, one r and one scale for all; always without experts."""
    specs = adapted(plan)
    if not specs:
        return not are_apart(plan, model)
    whole = all(
        len(each) == sum(1 for _ in model.get_submodule(name.rpartition(".")[0]).children())
        for name, each in parameters(plan).items()
    )
    alike = {(spec.r, spec.scale) for spec in plan.layers} == {(specs[0].r, specs[0].scale)}
    return whole and alike and not plan.lora_bias and plan.method.combine.name == "add"


def together(plan: Plan, tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors as PEFT has them."""
    kept, groups = dict(tensors), parameters(plan)
    for name, specs in groups.items():
        block, _, matrix = name.rpartition(".")
        inner = "base_layer." if matrix == FIRST and f"{block}.{SECOND}" in groups else ""
        factors = {key: [kept.pop(f"{prefix}{spec.name}.{key}") for spec in specs] for key in (A, B)}
        kept[f"{prefix}{block}.{inner}{A}"] = torch.cat(factors[A])
        kept[f"{prefix}{block}.{inner}{B}"] = torch.stack(factors[B], -1).flatten(1)
    return kept


def apart(targets: Iterable[str], r: int, tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of PEFT by the names of single experts.

    Args:
        targets: PEFT's `target_parameters`.
        r: of every expert.
        tensors: by PEFT's names.
        prefix: what these begin with.

    Raises:
        ValueError: a target is another parameter or has no tensors, or a tensor is not made of experts of rank r.
    """
    targets = list(targets)
    if wrong := [name for name in targets if name.rpartition(".")[2] not in (FIRST, SECOND)]:
        raise ValueError(f"target_parameters with {wrong[0]}, which is not computed here")
    kept, met = dict(tensors), set[str]()
    for key, factor in tensors.items():
        ending = next((each for each in (A, B) if key.endswith(f".{each}")), None)
        module = key.removeprefix(prefix).removesuffix(f".{ending}")
        block = module.removesuffix(".base_layer")
        named = [name for name in (FIRST, SECOND) if _is_meant(f"{block}.{name}", targets)]
        if ending is None or not named:
            continue
        matrix = named[0] if module != block or len(named) == 1 else SECOND
        count, rest = divmod(factor.shape[0 if ending == A else 1], r)
        if rest:
            raise ValueError(f"{key}, which is not made of experts of rank {r}")
        # Views: E·r rows of A expert by expert; r·E columns of B with the experts running fastest.
        of = factor.view(count, r, -1) if ending == A else factor.view(-1, r, count).permute(2, 0, 1)
        del kept[key]
        met |= {name for name in targets if _is_meant(f"{block}.{matrix}", [name])}
        kept |= {f"{prefix}{block}.{n}.{matrix}.{ending}": each.contiguous() for n, each in enumerate(of)}
    if lost := [name for name in targets if name not in met]:
        raise ValueError(f"target_parameters with {lost[0]}, for which it has no tensors")
    return kept


def _is_meant(parameter: str, targets: Iterable[str]) -> bool:
    return any(parameter == name or parameter.endswith(f".{name}") for name in targets)
