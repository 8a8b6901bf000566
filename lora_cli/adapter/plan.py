"""AdapterRecipe + the model's modules -> Plan: which layers are adapted, and how. Pure data; works on the meta device.

Every pattern has to match something: a name that is silently ignored is a run that trains less than was asked.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType

from torch import nn

from lora_cli import parts, presets
from lora_cli.adapter import rules
from lora_cli.adapter.base import Base
from lora_cli.adapter.delta import Shape
from lora_cli.adapter.quantised import Quantised
from lora_cli.errors import ExitCode, UserError
from lora_cli.parts import Part
from lora_cli.presets import Method
from lora_cli.recipe.schema import AdapterRecipe

R = 16
"""Where the recipe takes its own back: the schema's default."""
ALPHA = 32.0
"""Where the recipe names none: twice the default r."""
WHOLE = "whole"
"""The delta that is no delta: W itself trains."""
NONE = "none"
"""The delta of methods that train parameters of the model only."""
QUANTISED = ("linear", "conv1d")
"""Kinds of base that can be quantised."""
EVERYTHING = "everything"
"""In train_also: every parameter of the model."""


@dataclass(frozen=True)
class Ends:
    """The two ends of a language model, by module name."""

    embeddings: str
    head: str
    tied: bool
    """Whether both are one tensor."""


@dataclass(frozen=True)
class LayerSpec:
    """One adapted layer."""

    name: str
    base: str
    in_features: int
    out_features: int
    r: int
    alpha: float
    scale: float
    num_trainable: int


@dataclass(frozen=True)
class Plan:
    """Everything that `inject` does to a model."""

    method: Method
    layers: tuple[LayerSpec, ...]
    lora_bias: bool = False
    also: tuple[str, ...] = ()
    """Names of parameters that are trained in full."""
    new_rows: tuple[int, ...] = ()
    """Token ids whose rows of the embedding (and of the head) are trained."""
    ends: Ends = Ends("", "", False)
    quantised: Mapping[str, Part] = field(default_factory=dict[str, Part])
    """Layer, adapted or not, whose W0 is quantised -> in which format."""
    taken: bool = False
    """Whether something is taken off W0 before, which belongs to the adapter."""
    budget: float | None = None
    """Bits a weight of the quantised layers, on average, within which each is to get its own; None: they have them."""

    @property
    def touched(self) -> tuple[str, ...]:
        """The adapted layers, then those that are only quantised."""
        return tuple(dict.fromkeys([*(spec.name for spec in self.layers), *self.quantised]))

    @property
    def by_fisher(self) -> bool:
        """Whether bits are shared out by errors that count Fisher weights, as the init has them measured."""
        init = parts.load("init", self.method.init.name)
        return self.budget is not None and getattr(init, "measures", None) == "fisher"

    @property
    def measured(self) -> tuple[str, ...]:
        """Layers that something is asked of, where the init has that measured."""
        return self.touched if self.by_fisher else tuple(spec.name for spec in self.layers)

    @property
    def shared(self) -> dict[str, Shape]:
        """Tensors that several layers have in common, each as large as the largest of its layers asks for."""
        delta = parts.load("delta", self.method.delta.name)
        if not hasattr(delta, "shared_shapes"):
            return {}
        settings = parts.settings("delta", self.method.delta)
        found: dict[str, Shape] = {}
        for spec in self.layers:
            sizes = spec.in_features, spec.out_features, spec.r
            asked: dict[str, Shape] = delta.shared_shapes(spec.name, *sizes, **settings)
            for key, shape in asked.items():
                found[key] = tuple(map(max, shape, found.get(key, shape)))
        return found

    @property
    def shared_trained(self) -> dict[str, Shape]:
        """Those of them that train."""
        return {key: shape for key, shape in self.shared.items() if _trains(key, self.method)}

    @property
    def num_trainable(self) -> int:
        """Numbers that train, of all layers; what they share is counted once."""
        own = sum(spec.num_trainable for spec in self.layers)
        return own + sum(map(math.prod, self.shared_trained.values()))


def view_of(module: nn.Module) -> tuple[str, Base] | None:
    """The kind of base that a module is, and the view of it; None when no file of the axis knows it."""
    fitting = [(name, part) for name, part in _base_parts() if isinstance(module, part.wraps)]
    fitting = [(name, part) for name, part in fitting if getattr(part, "fits", any_module)(module)]
    if not fitting:
        return None
    name, part = max(fitting, key=lambda found: len(found[1].wraps.__mro__))
    return name, part.View(module)


def any_module(module: nn.Module) -> bool:
    """A base that takes all modules of its type says so by saying nothing."""
    return True


def make(
    adapter: AdapterRecipe,
    model: nn.Module,
    ends: Ends,
    new_rows: Iterable[int] = (),
    untied: bool = False,
    optimizer: Part | None = None,
    quantize: str | None = None,
    bits: float | None = None,
) -> Plan:
    """Match the patterns of `adapter` against the modules of `model`.

    Args:
        adapter: the section of the recipe.
        model: the plain model; only types and shapes are looked at.
        ends: its embeddings and its output head.
        new_rows: ids of added tokens.
        optimizer: the recipe's, when it names one; else the method's.
        untied: whether tied ends may be adapted because they will be (or have been) given separate weights.
        quantize: the recipe's `model.quantize`, when it names one; else the method's.
        bits: its `model.bits`.

    Raises:
        UserError: a pattern matches nothing, parts do not go together, one end of a tie is adapted, or there are too
            few bits.
    """
    method = presets.resolve(adapter, optimizer, quantize)
    written, adapter = adapter, presets.with_defaults(adapter)
    adaptable = _adaptable(model)
    names = _targets(adapter, adaptable, ends)
    kinds = {adaptable[name][0] for name in names} | _packed(adaptable)
    rules.check(method, rules.facts_of(method, written, kinds))
    check_in_full(adapter, method.base is not None or "packed" in kinds)
    whole = [f"{name}.weight" for name in names if method.delta.name == WHOLE]
    if whole and EVERYTHING in adapter.train_also:
        _check_unchosen(adapter)
    also = tuple(dict.fromkeys([*whole, *_also(adapter.train_also, model, ends)]))
    _check_norms(also, model)
    names = [] if method.delta.name in (WHOLE, NONE) else names
    _check_ends(names, also, tuple(new_rows), ends, untied)
    _check_patterns(adapter, names)
    numbers = sorted({number for number in map(_block, names) if number is not None})
    layers = tuple(_layer(name, *adaptable[name], _depth(name, numbers), adapter, method) for name in names)
    _check_together(
        layers, [name for name in adaptable if name not in {*names, ends.embeddings, ends.head}], method
    )
    quantised = to_quantise(method, model, ends, also)
    bits = bits if quantised else None
    if bits is not None:
        check_bits(bits, {name: adaptable[name][1] for name in quantised}, quantised)
    return Plan(method, layers, adapter.lora_bias, also, tuple(new_rows), ends, quantised, budget=bits)


def check_in_full(adapter: AdapterRecipe, quantised: bool) -> None:
    """Refuse to train everything in full where most of it is quantised.

    Raises:
        UserError: with what can be done instead.
    """
    if quantised and EVERYTHING in adapter.train_also:
        what, fix = "quantised weights cannot be trained in full", "leave everything out, or model.quantize"
        raise UserError(what, where="adapter.train_also", fix=fix)


def to_quantise(method: Method, model: nn.Module, ends: Ends, also: Collection[str]) -> dict[str, Part]:
    """Every linear layer but the output head and those whose weight trains in full -> the format of all."""
    if method.base is None:
        return {}
    names = [name for name, (kind, _) in _adaptable(model).items() if kind in QUANTISED]
    names = [name for name in names if name != ends.head and f"{name}.weight" not in also]
    return dict.fromkeys(names, method.base)


def check_bits(bits: float, bases: Mapping[str, Base], formats: Mapping[str, Part]) -> None:
    """Refuse fewer bits a weight than all layers take together in the smallest of their formats.

    Raises:
        UserError: with how many that are.
    """
    numbers = {name: base.in_features * base.out_features for name, base in bases.items()}
    files = {name: parts.load("base", part.name) for name, part in formats.items()}
    least = {
        name: min(file.bits_of(numbers[name], **each) for each in file.FORMATS)
        for name, file in files.items()
    }
    if (mean := sum(least.values()) / sum(numbers.values())) > bits:
        least_bits = math.ceil(mean * 1e4) / 1e4  # such that, written back, it is enough
        what, fix = f"the {len(numbers)} layers take {least_bits:g} bits a weight at least", "set more bits"
        raise UserError(what, where=f"model.bits: {bits:g}", fix=fix)


def _packed(adaptable: Mapping[str, tuple[str, Base]]) -> set[str]:
    """How the model came: words for the facts about its bases."""
    packed = any(isinstance(base.module, Quantised) for _, base in adaptable.values())
    return {"quantized", "packed"} if packed else set()


def _check_together(layers: tuple[LayerSpec, ...], others: list[str], method: Method) -> None:
    """Some deltas ask more of their layers than that each fits by itself; `others` are left alone."""
    misfit = getattr(parts.load("delta", method.delta.name), "misfit", None)
    if misfit is not None and (problem := misfit(layers, others)):
        raise UserError(problem, where="adapter.target_modules")


def _base_parts() -> list[tuple[str, ModuleType]]:
    return [(name, parts.load("base", name)) for name in parts.names("base")]


def _adaptable(model: nn.Module) -> dict[str, tuple[str, Base]]:
    found = {name: view_of(module) for name, module in model.named_modules() if name}
    return {name: view for name, view in found.items() if view is not None}


def _targets(adapter: AdapterRecipe, adaptable: dict[str, tuple[str, Base]], ends: Ends) -> list[str]:
    wanted = adapter.target_modules
    if wanted == "all-linear":
        linear = {n for n, (_, base) in adaptable.items() if not base.reads_ids and base.channels == -1}
        names = [n for n in adaptable if n in linear and n != ends.head]
        _require(names, "all-linear", adaptable, "adapter.target_modules")
    elif isinstance(wanted, str):
        pattern = _regex(wanted, "adapter.target_modules")
        names = [name for name in adaptable if pattern.fullmatch(name)]
        _require(names, wanted, adaptable, "adapter.target_modules")
    else:
        names = _matching(wanted, adaptable, "adapter.target_modules")
    excluded = set(_matching(adapter.exclude_modules, names, "adapter.exclude_modules"))
    names = _in_layers(adapter.layers, [name for name in names if name not in excluded])
    if not names:
        raise UserError("no module is left to adapt", where="adapter", code=ExitCode.LEARNED_NOTHING)
    return names


def _ends_with(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _matching(wanted: Iterable[str], names: Iterable[str], where: str) -> list[str]:
    """The names that some entry of `wanted` is the end of; every entry has to match."""
    names = list(names)
    for word in wanted:
        _require([name for name in names if _ends_with(name, word)], word, names, where)
    return [name for name in names if any(_ends_with(name, word) for word in wanted)]


def _require(matched: list[str], word: str, names: Iterable[str], where: str) -> None:
    if matched:
        return
    endings = dict.fromkeys(last for name in names if (last := name.rpartition(".")[2]) != word)
    close = parts.nearest(word.rpartition(".")[2], endings, count=3) or list(endings)
    fix = f"modules of this model end in: {', '.join(close[:12])}"
    raise UserError(f"'{word}' matches no module", where=where, fix=fix, code=ExitCode.LEARNED_NOTHING)


def _regex(pattern: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"'{pattern}' is not a regular expression: {error}", where=where) from error


def _block(name: str) -> int | None:
    """The number of the block that a module is in: the first number in its name."""
    numbers = [int(piece) for piece in name.split(".") if piece.isdigit()]
    return numbers[0] if numbers else None


def _in_layers(layers: tuple[int, ...] | None, names: list[str]) -> list[str]:
    if layers is None:
        return names
    blocks = [number for number in map(_block, names) if number is not None]
    count = max(blocks, default=-1) + 1
    wrong = [number for number in layers if not -count <= number < count]
    if wrong:
        fix = f"the model has blocks 0 to {count - 1}"
        raise UserError(
            f"no block {wrong[0]}", where="adapter.layers", fix=fix, code=ExitCode.LEARNED_NOTHING
        )
    chosen = {number % count for number in layers}
    return [name for name in names if _block(name) in chosen]


def first_match(patterns: dict[str, int] | dict[str, float], name: str) -> int | float | None:
    """The value of the first pattern that matches the end of a module's name, which is PEFT's rule too."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return None


def _check_patterns(adapter: AdapterRecipe, names: list[str]) -> None:
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(adapter, key):
            _regex(pattern, f"adapter.{key}")
            matched = [name for name in names if re.match(rf"(.*\.)?({pattern})$", name)]
            _require(matched, pattern, names, f"adapter.{key}")


def _depth(name: str, blocks: list[int]) -> float:
    """Where a layer is between the first adapted block (0) and the last (1); outside of blocks, in the middle."""
    block = _block(name)
    return blocks.index(block) / (len(blocks) - 1) if block is not None and len(blocks) > 1 else 0.5


def _layer(
    name: str, kind: str, base: Base, depth: float, adapter: AdapterRecipe, method: Method
) -> LayerSpec:
    r = int(first_match(adapter.rank_pattern, name) or adapter.r or R)
    controller = parts.load("rank", method.rank.name)
    if hasattr(controller, "initial_r"):
        r = controller.initial_r(r, depth=depth, **parts.settings("rank", method.rank))
    alpha = float(first_match(adapter.alpha_pattern, name) or adapter.alpha or ALPHA)
    if adapter.lora_bias and base.bias is None:
        fix = "leave it out: without a bias in the layer it could never be merged"
        raise UserError(f"{name} has no bias", where="adapter.lora_bias", fix=fix)
    problem = getattr(parts.load("delta", method.delta.name), "problem", no_problem)
    if found := problem(base.in_features, base.out_features, r, **parts.settings("delta", method.delta)):
        where = _blamed(found, method.delta)
        raise UserError(f"{name} ({base.out_features}×{base.in_features}): {found}", where=where)
    scaling = parts.settings("scale", method.scale)
    scale = parts.load("scale", method.scale.name).scale(alpha, r, **scaling)
    spec = LayerSpec(name, kind, base.in_features, base.out_features, r, alpha, scale, 0)
    return replace(spec, num_trainable=_num_trainable(spec, method, adapter.lora_bias))


def _blamed(problem: str, delta: Part) -> str:
    """The key that a problem begins with, as in `length = 256 has to divide ...`: a setting of the part, or r."""
    key = problem.partition(" = ")[0]
    return f"adapter.delta.{delta.name}.{key}" if key in parts.settings("delta", delta) else "adapter.r"


def _num_trainable(spec: LayerSpec, method: Method, lora_bias: bool) -> int:
    count = sum(math.prod(shape) for key, shape in own_shapes(spec, method).items() if _trains(key, method))
    return count + (spec.out_features if lora_bias else 0)


def own_shapes(spec: LayerSpec, method: Method) -> dict[str, Shape]:
    """The tensors of one layer, of ΔW and of how it is combined with W0, without those that it shares."""
    return _shapes(spec, method, parts.load("delta", method.delta.name).shapes)


def saved_shapes(spec: LayerSpec, method: Method) -> dict[str, Shape]:
    """The same as they are saved."""
    delta = parts.load("delta", method.delta.name)
    return _shapes(spec, method, getattr(delta, "packed_shapes", delta.shapes))


def _shapes(spec: LayerSpec, method: Method, of_delta: Callable[..., dict[str, Shape]]) -> dict[str, Shape]:
    own = of_delta(spec.in_features, spec.out_features, spec.r, **parts.settings("delta", method.delta))
    return own | parts.load("combine", method.combine.name).shapes(spec.out_features)


def _trains(key: str, method: Method) -> bool:
    """Whether a tensor trains; what is shared by some layers only has their group before its name."""
    key = key.rpartition(".")[2]
    frozen = getattr(parts.load("delta", method.delta.name), "FROZEN", frozenset())
    return key not in frozen and parts.load("trainable", method.trainable.name).trains(key)


def with_ranks(plan: Plan, ranks: Mapping[str, int]) -> Plan:
    """The plan with another r for some layers; their scale stays what it was."""
    layers = [replace(spec, r=ranks[spec.name]) for spec in plan.layers]
    counts = [_num_trainable(spec, plan.method, plan.lora_bias) for spec in layers]
    counted = zip(layers, counts, strict=True)
    return replace(plan, layers=tuple(replace(spec, num_trainable=count) for spec, count in counted))


def no_problem(in_features: int, out_features: int, r: int, **settings: object) -> str | None:
    """A delta that fits every shape says so by saying nothing."""
    return None


def _also(wanted: tuple[str, ...], model: nn.Module, ends: Ends) -> tuple[str, ...]:
    """Names of the parameters that `train_also` stands for."""
    chosen: dict[str, None] = {}
    for word in wanted:
        names = _also_one(word, model, ends)
        if not names:
            modules = [name for name, _ in model.named_modules() if name]
            _require(
                [],
                word,
                [EVERYTHING, "norms", "embeddings", "head", "biases", *modules],
                "adapter.train_also",
            )
        chosen.update(dict.fromkeys(names))
    return tuple(chosen)


def _also_one(word: str, model: nn.Module, ends: Ends) -> list[str]:
    if word == EVERYTHING:
        return [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if word == "biases":
        return [name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"]
    if word == "norms":
        modules = [name for name, module in model.named_modules() if "Norm" in type(module).__name__]
    else:
        word = {"embeddings": ends.embeddings, "head": ends.head}.get(word, word)
        modules = [name for name, _ in model.named_modules() if name and _ends_with(name, word)]
    return [f"{name}.{key}" for name in modules for key, _ in model.get_submodule(name).named_parameters()]


def _check_unchosen(adapter: AdapterRecipe) -> None:
    """Where everything trains whole, a choice of modules would be read and passed over."""
    for key in ("target_modules", "exclude_modules", "layers"):
        if getattr(adapter, key) not in (AdapterRecipe.model_fields[key].default, None):
            what, fix = (
                "has no effect where everything is trained",
                "leave it out, or set adapter.train_also: []",
            )
            raise UserError(what, where=f"adapter.{key}", fix=fix)


def _check_norms(also: tuple[str, ...], model: nn.Module) -> None:
    """On a CPU a norm computes in one type: what trains is float32, so nothing else of it may be in 16 bits."""
    for name in also:
        owner = name.rpartition(".")[0]
        rest = {
            key: p
            for key, p in model.get_submodule(owner).named_parameters(prefix=owner, recurse=False)
            if key not in also
        }
        halves = [key for key, p in rest.items() if p.device.type == "cpu" and p.element_size() == 2]
        if halves and "Norm" in type(model.get_submodule(owner)).__name__:
            what = f"{name} would train in float32 beside {halves[0]} in 16 bits, which a CPU cannot compute"
            raise UserError(what, where="adapter.train_also", fix="add norms to it, so that both train")


def _check_ends(
    names: list[str], also: tuple[str, ...], new_rows: tuple[int, ...], ends: Ends, untied: bool
) -> None:
    at_ends = {ends.embeddings, ends.head}
    doubled = [name for name in names if f"{name}.weight" in also]
    if doubled:
        raise UserError(f"{doubled[0]} is both adapted and trained in full", where="adapter.train_also")
    if new_rows and (at_ends & set(names) or {f"{end}.weight" for end in at_ends} & set(also)):
        fix = "leave them out of target_modules and train_also"
        what = "with model.add_tokens the embeddings and the head train their new rows only"
        raise UserError(what, where="adapter", fix=fix)
    touched = {name for name in at_ends if name in names or f"{name}.weight" in also}
    if ends.tied and not untied and len(touched & at_ends) == 1:
        raise UserError(
            f"{next(iter(touched))} shares its weight with the other end of the model",
            where="adapter",
            fix="set model.untie: true to give the head a weight of its own",
        )
