"""Put a planned adapter into a model, in place, layer by layer; take it out again; merge it.

The base's own tensors are never written to: what is trained in full is swapped in beside the original.
"""

import hashlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora_cli import parts
from lora_cli.adapter.delta import Delta
from lora_cli.adapter.layer import Adapted
from lora_cli.adapter.plan import Ends, LayerSpec, Plan, view_of
from lora_cli.adapter.rows import Rows
from lora_cli.errors import ExitCode, UserError
from lora_cli.parts import Part


@dataclass
class Adapter:
    """One adapter on a model. Several can be on one model; at most one is active."""

    model: nn.Module
    plan: Plan
    deltas: dict[str, Delta]
    """Layer name -> ΔW."""
    rows: dict[str, Rows] = field(default_factory=dict)
    """Embedding and head -> the rows of new tokens; both ends of a tied model share theirs."""
    also: dict[str, nn.Parameter] = field(default_factory=dict)
    """Parameter name -> the copy that is trained in full, float32."""
    originals: dict[str, nn.Parameter] = field(default_factory=dict)
    """Parameter name -> the base's own."""

    def activate(self) -> None:
        """Let the model compute with this adapter."""
        for name, delta in [*self.deltas.items(), *self.rows.items()]:
            adapted(self.model, name).active = (delta,)
        for name, parameter in self.also.items():
            _put(self.model, name, parameter)

    def deactivate(self) -> None:
        """Let the model compute what the base computes."""
        for name in [*self.deltas, *self.rows]:
            adapted(self.model, name).active = ()
        for name, parameter in self.originals.items():
            _put(self.model, name, parameter)

    def named_tensors(self) -> dict[str, nn.Parameter]:
        """Every tensor of the adapter, trained or frozen, under a name that is stable across runs; ties once."""
        named = {f"{layer}.{key}": p for layer, d in self.deltas.items() for key, p in d.named_parameters()}
        named |= {
            f"{layer}.{key}": p for layer, rows in self.rows.items() for key, p in rows.named_parameters()
        }
        # A layer's bias that is trained in full is another tensor than the bias of its delta.
        named |= {f"also.{name}": p for name, p in self.also.items()}
        seen: dict[int, str] = {}
        return {name: p for name, p in named.items() if seen.setdefault(id(p), name) == name}

    def trainable(self) -> dict[str, nn.Parameter]:
        """The tensors that train, by the same names."""
        return {name: p for name, p in self.named_tensors().items() if p.requires_grad}


def inject(model: nn.Module, plan: Plan, seed: int = 0, name: str = "default") -> Adapter:
    """Freeze the model, wrap the planned layers, draw the first ΔW, and return the active adapter.

    Args:
        model: changed in place; its own tensors are not.
        plan: what to adapt.
        seed: the factors depend on it and on the layer's name only, not on device or order.
        name: tells adapters on one model apart.
    """
    model.requires_grad_(False)
    deltas = {spec.name: _wrap(model, spec, plan, seed, name) for spec in plan.layers}
    adapter = Adapter(model, plan, deltas, _new_rows(model, plan, name))
    adapter.originals = {each: _get(model, each) for each in plan.also}
    adapter.also = _copies(adapter.originals, plan.ends.tied)
    adapter.activate()
    return adapter


@contextmanager
def without_adapters(*adapters: Adapter) -> Generator[None]:
    """Inside the block the model is the base, to the bit."""
    for adapter in adapters:
        adapter.deactivate()
    try:
        yield
    finally:
        for adapter in adapters[-1:]:
            adapter.activate()


def adapted(model: nn.Module, name: str) -> Adapted:
    """The adapted layer of that name."""
    layer = model.get_submodule(name)
    assert isinstance(layer, Adapted), f"{name} is not adapted"
    return layer


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """All adapted layers with their names."""
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            yield name, module


def merge(model: nn.Module, adapter: Adapter, dtype: torch.dtype | None = None) -> dict[str, float]:
    """Replace every adapted layer by a plain one with W0 + ΔW, one at a time; the model has no adapter afterwards.

    The sum is made in float32 and cast once, to `dtype` or to the base's own type.

    Returns:
        layer, or parameter trained in full -> ‖cast(W) − W‖ / ‖W − W0‖ (Frobenius): what rounding took, as a share
        of what was learned.

    Raises:
        UserError: a merged weight is too large for its type.
    """
    adapter.activate()
    lost: dict[str, float] = {}
    layers = dict(adapted_layers(model))
    for name, layer in layers.items():
        W, bias = layer.merged_weight(), layer.merged_bias()
        original = adapter.originals.get(f"{name}.weight", _get(model, f"{name}.weight"))
        stored = rounded(W, dtype or original.dtype, name)
        lost[name] = _lost(stored, W, layer.base.weight())
        bias = None if bias is None else rounded(bias, stored.dtype, name)
        model.set_submodule(name, layer.base.replaced(stored, bias))
    for name, parameter in adapter.also.items():
        if name.rpartition(".")[0] in layers:
            continue  # it was active, so it is part of what was merged
        original = adapter.originals[name]
        stored = rounded(parameter.detach(), dtype or original.dtype, name)
        lost[name] = _lost(stored, parameter.detach(), original.detach().float())
        _put(model, name, nn.Parameter(stored, requires_grad=False))
    _tie_again(model, adapter.plan.ends)
    return lost


def _tie_again(model: nn.Module, ends: Ends) -> None:
    """Ends that were one tensor are one again, unless they have become different."""
    if not ends.tied:
        return
    embeddings, head = _get(model, f"{ends.embeddings}.weight"), _get(model, f"{ends.head}.weight")
    if torch.equal(embeddings, head):
        _put(model, f"{ends.head}.weight", embeddings)


def rounded(W: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Cast once.

    Raises:
        UserError: a number is too large for the type; `name` says whose.
    """
    stored = W.to(dtype)
    if not torch.isfinite(stored).all():
        what = f"the merged weight is not finite in {str(dtype).removeprefix('torch.')}"
        fix = "bfloat16 and float32 hold larger numbers" if dtype == torch.float16 else ""
        raise UserError(what, where=name, fix=fix, code=ExitCode.VERIFICATION)
    return stored


def _lost(stored: Tensor, W: Tensor, W0: Tensor) -> float:
    change = torch.linalg.norm(W - W0).item()
    return torch.linalg.norm(stored.float() - W).item() / change if change else 0.0


def _wrap(model: nn.Module, spec: LayerSpec, plan: Plan, seed: int, name: str) -> Delta:
    """Make the delta of one layer and hang it into the model."""
    layer = _adapted_here(model, spec.name, plan.method.combine.name)
    method, base = plan.method, layer.base
    dropout = None if base.reads_ids else _make("dropout", method.dropout)
    make = parts.load("delta", method.delta.name).make
    delta = make(base, spec.r, spec.scale, dropout, plan.lora_bias, **method.delta.settings)
    init = parts.load("init", method.init.name).init
    with torch.no_grad():
        init(delta, generator_of(seed, spec.name), **method.init.settings)
    trains = parts.load("trainable", method.trainable.name).trains
    for key, parameter in delta.named_parameters():
        parameter.requires_grad_(trains(key))
    layer.deltas[name] = delta.to(layer.base_layer.weight.device)
    return delta


def _adapted_here(model: nn.Module, name: str, combine: str) -> Adapted:
    """The adapted layer of that name; the plain one is wrapped when it is not yet."""
    module = model.get_submodule(name)
    if isinstance(module, Adapted):
        return module
    view = view_of(module)
    assert view is not None, "the plan only names adaptable layers"
    layer = parts.load("combine", combine).make(view[1])
    model.set_submodule(name, layer)
    return layer


def _make(axis: str, part: Part) -> nn.Module | None:
    return parts.load(axis, part.name).make(**part.settings)


def generator_of(seed: int, name: str) -> torch.Generator:
    """Random numbers for one layer: always from the CPU, so that every device starts from the same factors."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _new_rows(model: nn.Module, plan: Plan, name: str) -> dict[str, Rows]:
    if not plan.new_rows:
        return {}
    shared: nn.Parameter | None = None
    made: dict[str, Rows] = {}
    for end in (plan.ends.embeddings, plan.ends.head):
        layer = _adapted_here(model, end, "add")
        made[end] = Rows(layer.base, plan.new_rows, shared).to(layer.base_layer.weight.device)
        layer.deltas[name] = made[end]
        if plan.ends.tied:
            shared = made[end].values
    return made


def _copies(originals: dict[str, nn.Parameter], tied: bool) -> dict[str, nn.Parameter]:
    """Trainable float32 copies; tied parameters stay one tensor, unless the plan takes them apart."""
    made: dict[int | str, nn.Parameter] = {}
    return {
        name: made.setdefault(id(p) if tied else name, nn.Parameter(p.detach().float().clone()))
        for name, p in originals.items()
    }


def _get(model: nn.Module, name: str) -> nn.Parameter:
    return model.get_parameter(_path(model, name))


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, key = _path(model, name).rpartition(".")
    model.get_submodule(owner).register_parameter(key, parameter)


def _path(model: nn.Module, name: str) -> str:
    """Where a parameter of the plain model is now: inside the wrapped layer if its module is adapted."""
    owner, _, key = name.rpartition(".")
    inside = isinstance(model.get_submodule(owner), Adapted)
    return f"{owner}.base_layer.{key}" if inside else name


def tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    """Detached tensors of the adapter, for saving."""
    return {name: parameter.detach() for name, parameter in adapter.named_tensors().items()}
