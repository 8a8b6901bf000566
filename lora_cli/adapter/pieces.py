"""Merge an adapter piece by piece into a model whose weights are not in memory. Read `merged` first.

A piece is what has to be merged together: an adapted layer, or both ends of a model with new tokens. Each is merged by
`inject.merge`, so that what comes out is, bit for bit, what it makes of the whole model.
"""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lora_cli.adapter import files, inject
from lora_cli.adapter.delta import Shared
from lora_cli.adapter.layer import Adapted
from lora_cli.adapter.plan import Ends, Plan
from lora_cli.adapter.saved import Saved
from lora_cli.adapter.seed import generator_of

INPUTS = 16
"""Rows that a layer and its merged form are given, to see that they compute the same."""


@dataclass(frozen=True)
class Piece:
    """A part of a plan, and the parameters of the model that it takes and gives."""

    plan: Plan
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Merged:
    """A piece in float32."""

    before: dict[str, Tensor]
    """Parameter -> W0, laid out as in the model."""
    after: dict[str, Tensor]
    """Parameter -> W."""
    losing: dict[str, str]
    """Layer, or parameter trained in full -> the parameter that rounding takes from."""
    error: float
    """Largest ‖merged − live‖ / ‖live‖ of what its layers compute from random inputs."""


def pieces(plan: Plan, model: nn.Module) -> list[Piece]:
    """The pieces of a plan; together they are all that the adapter changes."""
    ends = (plan.ends.embeddings, plan.ends.head)
    together = [f"{end}.weight" for end in ends] if plan.ends.tied else []
    found: list[Piece] = []
    if plan.new_rows:
        part = replace(plan, layers=(), also=tuple(name for name in plan.also if _owner(name) in ends))
        found.append(Piece(part, _parameters(model, ends)))
    elif together and all(name in plan.also for name in together):
        found.append(Piece(replace(plan, layers=(), also=tuple(together)), tuple(together)))
    for spec in plan.layers:
        also = tuple(name for name in plan.also if _owner(name) == spec.name)
        part = replace(plan, layers=(spec,), also=also, new_rows=(), ends=_apart(plan.ends))
        found.append(Piece(part, _parameters(model, (spec.name,))))
    taken = {name for piece in found for name in piece.parameters}
    for name in plan.also:
        if name not in taken:
            part = replace(plan, layers=(), also=(name,), new_rows=(), ends=_apart(plan.ends))
            found.append(Piece(part, (name,)))
    return found


def merged(
    model: nn.Module, piece: Piece, saved: Saved, read: Callable[[str], Tensor], shared: Shared
) -> Merged:
    """Merge one piece; the model is on the meta device before and afterwards.

    Args:
        model: plain, without contents.
        piece: one of `pieces`.
        saved: the adapter.
        read: parameter name -> W0 in float32, laid out as in the model.
        shared: of the whole plan, see `inject.shared_of`.

    Raises:
        UserError: no weight can stand for what the adapter adds.
    """
    with _filled(model, piece.parameters, read) as before:
        taken = files.taken_of(saved, model) if piece.plan.taken else None
        adapter = inject.inject(model, piece.plan, taken=taken, shared=shared)
        files.fill(adapter, saved)
        inject.refuse_unmergeable(adapter)
        layers = {**adapter.layers, **adapter.ends}
        with torch.no_grad():
            inputs = {name: _inputs(layer, name, piece.plan) for name, layer in layers.items()}
            live = {name: layer.eval()(inputs[name]) for name, layer in layers.items()}
            losing = {name: f"{name}.weight" for name in layers}
            losing |= {name: name for name in adapter.also if _owner(name) not in layers}
            inject.merge(model, adapter, torch.float32)
            error = max(
                (_error(model.get_submodule(name)(inputs[name]), y) for name, y in live.items()), default=0.0
            )
        after = {name: model.get_parameter(name).detach() for name in piece.parameters}
        return Merged(before, after, losing, error)


def _error(found: Tensor, expected: Tensor) -> float:
    scale = torch.linalg.norm(expected).item()
    return torch.linalg.norm(found - expected).item() / scale if scale else torch.linalg.norm(found).item()


def _inputs(layer: Adapted, name: str, plan: Plan) -> Tensor:
    """Random rows, or ids with those of the new tokens among them."""
    drawn = generator_of(0, f"merge {name}")
    if not layer.base.reads_ids:
        return torch.randn(INPUTS, layer.base.in_features, generator=drawn)
    ids = torch.randint(layer.base.in_features, (INPUTS,), generator=drawn)
    return torch.cat([ids, torch.tensor(plan.new_rows, dtype=torch.int64)])


@contextmanager
def _filled(
    model: nn.Module, names: Iterable[str], read: Callable[[str], Tensor]
) -> Generator[dict[str, Tensor]]:
    """Inside the block these parameters have contents; tied ones are read once and stay one tensor."""
    empty = {name: model.get_parameter(name) for name in names}
    modules = {owner: model.get_submodule(owner) for owner in map(_owner, empty)}
    read_once: dict[int, nn.Parameter] = {}
    try:
        for name, parameter in empty.items():
            if id(parameter) not in read_once:
                read_once[id(parameter)] = nn.Parameter(read(name), requires_grad=False)
            _put(modules[_owner(name)], name, read_once[id(parameter)])
        yield {name: read_once[id(parameter)].detach() for name, parameter in empty.items()}
    finally:
        for owner, module in modules.items():
            model.set_submodule(owner, module)
        for name, parameter in empty.items():
            _put(modules[_owner(name)], name, parameter)


def _put(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    module.register_parameter(name.rpartition(".")[2], parameter)


def _parameters(model: nn.Module, modules: Iterable[str]) -> tuple[str, ...]:
    return tuple(
        f"{name}.{key}"
        for name in modules
        for key, _ in model.get_submodule(name).named_parameters(recurse=False)
    )


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _apart(ends: Ends) -> Ends:
    return replace(ends, tied=False)
