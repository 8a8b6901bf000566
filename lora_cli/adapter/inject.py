"""Put a planned adapter into a model, in place, layer by layer; take it out again; merge it.

The base's own tensors are never written to: what is trained in full, or moved, is swapped in beside the original.
"""

import math
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_cli import parts
from lora_cli.adapter import bits, rules
from lora_cli.adapter.base import SIGNS, Base
from lora_cli.adapter.delta import Delta, LowRank, Place, Shared
from lora_cli.adapter.layer import Adapted
from lora_cli.adapter.plan import Ends, LayerSpec, Plan, view_of
from lora_cli.adapter.quantised import Quantised, digest, remainder
from lora_cli.adapter.reading import Reader, reader_of
from lora_cli.adapter.rows import Rows
from lora_cli.adapter.seed import generator_of
from lora_cli.adapter.start import Start
from lora_cli.errors import ExitCode, UserError
from lora_cli.parts import Part

ROWS_AT_ONCE = 1024
Rounding = Callable[[tuple[Tensor, Tensor] | None], Tensor]
"""(B, A) -> what quantising makes of W0 + B·A, float32."""


@dataclass
class Adapter:
    """One adapter of a model. A model may have several; at most one is active, the others' layers are not in it."""

    model: nn.Module
    plan: Plan
    layers: dict[str, Adapted]
    """Name -> the layer that stands there while the adapter is active."""
    ends: dict[str, Adapted] = field(default_factory=dict)
    """Embedding and head with the rows of new tokens; both ends of a tied model share theirs."""
    also: dict[str, nn.Parameter] = field(default_factory=dict)
    """Parameter name -> the copy that is trained in full, or moved, float32."""
    originals: dict[str, nn.Parameter] = field(default_factory=dict)
    """Parameter name -> the base's own."""
    shared: dict[str, nn.Parameter] = field(default_factory=dict)
    """Tensors that several layers have in common."""
    absorbed: dict[str, list[tuple[Tensor, Tensor]] | None] = field(default_factory=dict)
    """Layer whose W moves -> the factors (B, A) of what was added to it; None once they would be larger than W."""
    codes: str | None = None
    """A hash of the quantised base that it was put on; None where nothing is quantised."""

    @property
    def deltas(self) -> dict[str, Delta]:
        """Layer name -> ΔW."""
        return {name: layer.delta for name, layer in self.layers.items()}

    @property
    def lowrank(self) -> dict[str, LowRank]:
        """Those of them that have one A and one B."""
        return {name: delta for name, delta in self.deltas.items() if isinstance(delta, LowRank)}

    @property
    def rows(self) -> dict[str, Rows]:
        """Embedding and head -> the rows of new tokens."""
        return {name: layer.delta for name, layer in self.ends.items() if isinstance(layer.delta, Rows)}

    def activate(self) -> None:
        """Let the model compute with this adapter; no other one may be active."""
        for name, layer in [*self.layers.items(), *self.ends.items()]:
            self.model.set_submodule(name, layer.train(self.model.training))
        for name, parameter in self.also.items():
            _put(self.model, name, parameter)

    def deactivate(self) -> None:
        """Make the model the plain base again."""
        for name, layer in [*self.layers.items(), *self.ends.items()]:
            self.model.set_submodule(name, layer.base_layer)
        for name, parameter in self.originals.items():
            _put(self.model, name, parameter)

    def named_tensors(self) -> dict[str, nn.Parameter]:
        """Every tensor of the adapter, trained or frozen, under a name that is stable across runs; ties once."""
        named = {
            f"{name}.{key}": p
            for name, layer in [*self.layers.items(), *self.ends.items()]
            for key, p in layer.own_tensors().items()
        }
        # A layer's bias that is trained in full is another tensor than the bias of its delta.
        named |= {f"also.{name}": p for name, p in self.also.items()}
        seen: dict[int, str] = {}
        return {name: p for name, p in named.items() if seen.setdefault(id(p), name) == name}

    def trainable(self) -> dict[str, nn.Parameter]:
        """The tensors that train, by the same names."""
        return {name: p for name, p in self.named_tensors().items() if p.requires_grad}

    def move(self, name: str) -> None:
        """Let W of a layer be a float32 copy, which may be written to; the original stays as it is."""
        key = f"{name}.weight"
        if key not in self.also:
            self.originals[key] = self.layers[name].base_layer.weight
            self.also[key] = nn.Parameter(self.originals[key].detach().float().clone(), requires_grad=False)
            self.layers[name].base_layer.weight = self.also[key]
            self.absorbed[name] = []

    def absorb(self, name: str) -> None:
        """Add ΔW to the W that `move` made; its factors are remembered as long as they are smaller than W."""
        layer = self.layers[name]
        known, factors = self.absorbed[name], layer.delta.factors()  # before W moves: some are made of it
        layer.base.set_weight(layer.merged_weight())
        self.absorbed[name] = None
        if known is not None and factors is not None:
            together = [*known, (factors[0].clone(), factors[1].clone())]
            if (
                sum(B.numel() + A.numel() for B, A in together)
                < layer.base.in_features * layer.base.out_features
            ):
                self.absorbed[name] = together

    def original_weight(self, name: str) -> Tensor:
        """W0 of a layer in float32 [out, in], wherever training has moved it to."""
        layer = {**self.layers, **self.ends}[name]
        key = f"{name}.weight"
        if key not in self.originals:
            return layer.base.weight()
        layer.base_layer.weight = self.originals[key]
        W0 = layer.base.weight()
        layer.base_layer.weight = self.also[key]
        return W0


def inject(
    model: nn.Module,
    plan: Plan,
    seed: int = 0,
    statistics: Mapping[str, Tensor] | None = None,
    shared: Shared | None = None,
    taken: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Adapter:
    """Freeze the model, wrap the planned layers, draw the first ΔW, quantise W0, and return the active adapter.

    The plan that it has says of each layer in how many bits it is kept, where this one only says in how many all are.

    Args:
        model: changed in place; its own tensors are not, but for those that are quantised. No other adapter is active.
        plan: what to adapt.
        seed: the factors depend on it and on the layer's name only, not on device or order.
        statistics: layer -> what the init asked to be measured of it.
        taken: layer -> (B, A) of what a saved adapter was started with, in place of what an init would take off W0.
        shared: what the layers have in common with others, where the plan is a part of a larger one.
        advance: told how many more of `Plan.touched` are done.
    """
    model.requires_grad_(False)
    shared = shared or shared_of(plan, seed)
    shared.reader = reader_of(model)
    found, taken = statistics or {}, taken or {}
    if plan.budget is not None:
        plan = _with_bits(model, plan, plan.budget, seed, shared.reader, found)
    layers: dict[str, Adapted] = {}
    for spec in plan.layers:
        rounding = _rounding(model, spec.name, plan)
        delta = _start(model, spec, plan, seed, shared, found.get(spec.name), rounding)
        if (known := taken.get(spec.name)) is not None:
            assert isinstance(delta, LowRank), "the files that are read are checked"
            delta.fix(*known)
        layers[spec.name] = _wrap(model, spec, plan, delta)
        advance(1)
    for name in plan.touched[len(layers) :]:
        _quantise(model, name, plan)
        advance(1)
    adapter = Adapter(model, plan, layers, _new_rows(model, plan), shared=shared.tensors, codes=digest(model))
    adapter.originals = {each: _get(model, each) for each in plan.also}
    adapter.also = _copies(adapter.originals, plan.ends.tied)
    adapter.activate()
    return adapter


def shared_of(plan: Plan, seed: int = 0) -> Shared:
    """What the layers of a plan have in common; each tensor is made by the first layer that asks for it."""
    return Shared(plan.shared, seed)


@contextmanager
def without_adapters(*adapters: Adapter) -> Generator[None]:
    """Inside the block the model is the base, to the bit; afterwards the last of the adapters is active."""
    for adapter in adapters:
        adapter.deactivate()
    try:
        yield
    finally:
        for adapter in adapters[-1:]:
            adapter.activate()


def merge(model: nn.Module, adapter: Adapter, dtype: torch.dtype | None = None) -> dict[str, float]:
    """Replace every adapted layer by a plain one with W0 + ΔW, one at a time; the model has no adapter afterwards.

    The sum is made in float32 and cast once, to `dtype` or to the base's own type.

    Returns:
        layer, or parameter trained in full -> ‖cast(W) − W‖ / ‖W − W0‖ (Frobenius): what rounding took, as a share
        of what was learned.

    Raises:
        UserError: no plain layer computes the same, or a merged weight is too large for its type.
    """
    refuse_unmergeable(adapter)
    adapter.activate()
    lost: dict[str, float] = {}
    layers = {**adapter.layers, **adapter.ends}
    for name, layer in layers.items():
        W, bias = layer.merged_weight(), layer.merged_bias()
        W0 = adapter.original_weight(name)
        original = adapter.originals.get(f"{name}.weight")
        stored = rounded(W, dtype or (layer.base if original is None else original).dtype, name)
        lost[name] = lost_by(stored, W, W0)
        bias = None if bias is None else rounded(bias, stored.dtype, name)
        model.set_submodule(name, layer.base.replaced(stored, bias))
    for name, parameter in adapter.also.items():
        if name.rpartition(".")[0] in layers:
            continue  # it was active, so it is part of what was merged
        original = adapter.originals[name]
        stored = rounded(parameter.detach(), dtype or original.dtype, name)
        lost[name] = lost_by(stored, parameter.detach(), original.detach().float())
        _put(model, name, nn.Parameter(stored, requires_grad=False))
    _tie_again(model, adapter.plan.ends)
    _dequantise(model, dtype)
    return lost


def refuse_unmergeable(adapter: Adapter) -> None:
    """Refuse what no plain layer can stand for.

    Raises:
        UserError: naming the first such layer.
    """
    mergeable = rules.is_mergeable(adapter.plan.method)
    for name, delta in adapter.deltas.items():
        if not mergeable:
            raise depends_on_input(adapter.plan.method.name, name)
        if delta.shift() is not None and adapter.layers[name].base.bias is None:
            what = "cannot be merged: it adds a bias, and the layer has none that could take it (lora_bias)"
            raise UserError(what, where=name, code=ExitCode.MODEL)


def depends_on_input(method: str, where: str) -> UserError:
    """The reason why some adapters are neither merged nor exported."""
    what = (
        f"cannot be merged or exported: what {method} adds depends on the input, so no weight stands for it"
    )
    fix = "use the adapter folder itself: lora generate, lora chat and lora eval read it"
    return UserError(what, where=where, fix=fix, code=ExitCode.MODEL)


def _dequantise(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Put a plain layer wherever a quantised one is left, with what it computed with."""
    left = [name for name, module in model.named_modules() if isinstance(module, Quantised)]
    for name in left:
        base = _base(model, name)
        stored = rounded(base.weight(), dtype or base.dtype, name)
        bias = None if base.bias is None else rounded(base.bias.detach(), stored.dtype, name)
        model.set_submodule(name, base.replaced(stored, bias))


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


def lost_by(stored: Tensor, W: Tensor, W0: Tensor) -> float:
    """‖stored − W‖ / ‖W − W0‖; some rows at a time, as all three may be large."""
    lost = change = 0.0
    blocks = (torch.atleast_1d(each).split(ROWS_AT_ONCE) for each in (stored, W, W0))
    for low, wide, before in zip(*blocks, strict=True):
        lost += (low.float() - wide).square().sum().item()
        change += (wide - before).square().sum().item()
    return math.sqrt(lost / change) if change else 0.0


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """‖found − expected‖ / ‖expected‖ over weight and bias of a layer together.

    That is how much of what the layer computes is another, root mean square over inputs without a direction of their
    own (standard normal ones): E‖W·x + b‖² = ‖W‖² + ‖b‖².
    """
    off = size = 0.0
    for name, W in expected.items():
        for low, wide in zip(
            *(torch.atleast_1d(each).split(ROWS_AT_ONCE) for each in (found[name], W)), strict=True
        ):
            off += (low.float() - wide).square().sum().item()
            size += wide.square().sum().item()
    return math.sqrt(off / size) if size else math.sqrt(off)


def _start(
    model: nn.Module,
    spec: LayerSpec,
    plan: Plan,
    seed: int,
    shared: Shared,
    statistic: Tensor | None,
    rounding: Rounding | None,
) -> Delta:
    """The first ΔW of a layer, beside W0 as it is on disk."""
    method, base = plan.method, _base(model, spec.name)
    dropout = None if base.reads_ids else _make("dropout", method.dropout)
    place = Place(base, spec.r, spec.scale, dropout, plan.lora_bias, shared, spec.name)
    delta = _make("delta", method.delta, place)
    start = Start(base, generator_of(seed, spec.name), statistic, rounding)
    with torch.no_grad():
        parts.load("init", method.init.name).init(delta, start, **parts.settings("init", method.init))
    return delta


def _rounding(model: nn.Module, name: str, plan: Plan) -> Rounding | None:
    """What quantising makes of W0, or of W0 and something thin added to it; None where nothing is quantised."""
    base, part = _base(model, name), plan.quantised.get(name)
    if part is None:
        return None

    def rounded(taken: tuple[Tensor, Tensor] | None) -> Tensor:
        return quantised(base, base.weight(), part, taken).dequantised(torch.float32).to(base.device)

    return rounded


def _with_bits(
    model: nn.Module, plan: Plan, budget: float, seed: int, reader: Reader, statistics: Mapping[str, Tensor]
) -> Plan:
    """The plan with bits for each layer, that together keep to the budget."""
    init, specs = parts.load("init", plan.method.init.name), {spec.name: spec for spec in plan.layers}
    takes_first = rules.SHIFTED in rules.of_part("init", plan.method.init.name) and not hasattr(
        init, "approximates"
    )

    def left(name: str) -> Tensor:
        delta = None
        if takes_first and name in specs:
            shared = shared_of(plan, seed)
            shared.reader = reader
            delta = _start(model, specs[name], _once(plan), seed, shared, statistics.get(name), exact(name))
        return remainder(_base(model, name).weight(), _taken(delta))

    def exact(name: str) -> Rounding:
        base = _base(model, name)
        return lambda taken: remainder(base.weight(), taken).to(base.device)

    fisher = statistics if plan.by_fisher else {}
    return bits.allotted(plan, budget, lambda name: _base(model, name), left, fisher)


def _once(plan: Plan) -> Plan:
    """The same with one turn of an init that takes turns with quantising."""
    init, settings = plan.method.init, parts.settings("init", plan.method.init)
    if "iterations" not in settings:
        return plan
    return replace(plan, method=replace(plan.method, init=Part(init.name, settings | {"iterations": 1})))


def _taken(delta: Delta | None) -> tuple[Tensor, Tensor] | None:
    """(B, A) of what a start adds to W0 before it is quantised."""
    if not isinstance(delta, LowRank) or delta.fixed_A is None or delta.fixed_B is None:
        return None
    return delta.fixed_B, delta.fixed_A


def _wrap(model: nn.Module, spec: LayerSpec, plan: Plan, delta: Delta) -> Adapted:
    """Make the layer that stands in for a plain one; the plain one, or what it is quantised to, stays where it is."""
    if spec.name in plan.quantised:
        _quantise(model, spec.name, plan, delta)
    method, base = plan.method, _base(model, spec.name)
    layer = _make("combine", method.combine, base, delta)
    trains = parts.load("trainable", method.trainable.name).trains
    for key, parameter in layer.own_tensors().items():
        parameter.requires_grad_(parameter.requires_grad and trains(key))
    device = layer.base.device
    return layer if device.type == "cpu" else layer.to(device)  # a fake tensor cannot be moved in place


def quantised(base: Base, W0: Tensor, part: Part, taken: tuple[Tensor, Tensor] | None) -> Quantised:
    """What stands in the place of a plain layer with the weight W0 [out, in], float32."""
    made: Quantised = parts.load("base", part.name).quantise(base, remainder(W0, taken), **part.settings)
    made.taken = taken
    return made


def _quantise(model: nn.Module, name: str, plan: Plan, delta: Delta | None = None) -> None:
    """Put codes where a plain layer stands, on the CPU, so that they do not depend on the device; let go of W0."""
    base = _base(model, name)
    made = quantised(base, base.weight(), plan.quantised[name], _taken(delta))
    made.register_buffer(SIGNS, base.signs(), persistent=False)
    made = made if base.device.type == "cpu" else made.to(base.device)
    model.set_submodule(name, made.train(base.module.training))
    if delta is not None:
        delta.put_on(_base(model, name))


def _base(model: nn.Module, name: str) -> Base:
    """W0 of a plain layer."""
    view = view_of(model.get_submodule(name))
    assert view is not None, "the plan only names layers that can be adapted, and no other adapter is active"
    return view[1]


def _make(axis: str, part: Part, *args: Any) -> Any:
    return parts.load(axis, part.name).make(*args, **parts.settings(axis, part))


def _new_rows(model: nn.Module, plan: Plan) -> dict[str, Adapted]:
    if not plan.new_rows:
        return {}
    shared: nn.Parameter | None = None
    made: dict[str, Adapted] = {}
    for end in (plan.ends.embeddings, plan.ends.head):
        base = _base(model, end)
        rows = Rows(base, plan.new_rows, shared).to(base.device)
        made[end] = Adapted(base, rows)
        if plan.ends.tied:
            shared = rows.values
    return made


def _copies(originals: dict[str, nn.Parameter], tied: bool) -> dict[str, nn.Parameter]:
    """Trainable float32 copies; tied parameters stay one tensor, unless the plan takes them apart."""
    made: dict[int | str, nn.Parameter] = {}
    return {
        name: made.setdefault(id(p) if tied else name, nn.Parameter(p.detach().float().clone()))
        for name, p in originals.items()
    }


def _get(model: nn.Module, name: str) -> nn.Parameter:
    owner, key = _owner(model, name)
    return owner.get_parameter(key)


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, key = _owner(model, name)
    owner.register_parameter(key, parameter)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The plain module that a parameter belongs to: inside the adapted layer where its module is adapted."""
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    return (module.base_layer if isinstance(module, Adapted) else module), key


def adapted_layers(model: nn.Module) -> dict[str, Adapted]:
    """The adapted layers that stand in a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}


def tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    """Detached tensors of the adapter, for saving."""
    return {name: parameter.detach() for name, parameter in adapter.named_tensors().items()}
