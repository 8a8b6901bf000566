"""PEFT's names for tensors and PEFT's config, in both directions.

base_model.model.<layer>.lora_A.weight [r, in], .lora_B.weight [out, r], .lora_B.bias [out]
base_model.model.<embedding>.lora_embedding_A [r, vocabulary], .lora_embedding_B [dim, r]
base_model.model.<embedding or head>.token_adapter.trainable_tokens_delta [tokens, dim]
base_model.model.<parameter trained in full>, with `.base_layer` in it where its module is adapted
base_model.model.<layer>.taken_A, .taken_B: what is added to W0 before it is quantised; PEFT has nothing like it
"""

import math
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from lora_cli.adapter import expert_format
from lora_cli.adapter.base import Base
from lora_cli.adapter.inject import Adapter
from lora_cli.adapter.plan import LayerSpec, Plan, first_match, saved_shapes, view_of

PREFIX = "base_model.model."
LINEAR = {
    "A": "lora_A.weight",
    "B": "lora_B.weight",
    "bias": "lora_B.bias",
    "magnitude": "lora_magnitude_vector",
}
LOOKUP = {"A": "lora_embedding_A", "B": "lora_embedding_B", "magnitude": LINEAR["magnitude"]}
SHARED = f"{PREFIX}shared."
ROWS = "token_adapter.trainable_tokens_delta"
TAKEN = "taken_"

LORA = "LORA"
OURS = "LORA_CLI"
"""Type of an adapter that PEFT would not compute: it refuses a type it does not know."""

HARMLESS_STARTS = (True, False, "gaussian", "orthogonal", "eva", "mica")
"""Starts that leave the base as it is; after the others the adapter fits a changed base only."""

Rank = Annotated[int, Field(ge=1, lt=2**31)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class Config(BaseModel):
    """What we read of PEFT's LoraConfig; everything else is in `model_extra`."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    peft_type: str
    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: Rank = 8
    lora_alpha: float = 8.0
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, float] | None = None
    trainable_token_indices: list[TokenId] | dict[str, list[TokenId]] | None = None
    init_lora_weights: bool | str = True
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    modules_to_save: list[str] | None = None
    target_parameters: list[str] | None = None

    def unknown(self) -> list[str]:
        """Keys that ask for something that would not be computed here."""
        return sorted(
            key for key, value in (self.model_extra or {}).items() if value and key not in NO_EFFECT
        )

    def surely_adapts(self, layer: str) -> bool:
        """Whether the config names the layer without any restriction that might leave it out."""
        restricted = self.exclude_modules or self.modules_to_save or self.layers_to_transform is not None
        plain = isinstance(self.target_modules, list) and not restricted
        return plain and any(
            layer == name or layer.endswith(f".{name}") for name in self.target_modules or ()
        )

    def shape_of(self, layer: str) -> tuple[int, float]:
        """Rank and alpha of a layer.

        Raises:
            re.error: a pattern is not a regular expression.
        """
        r = first_match(self.rank_pattern or {}, layer)
        alpha = first_match(self.alpha_pattern or {}, layer)
        return int(self.r if r is None else r), float(self.lora_alpha if alpha is None else alpha)


NO_EFFECT = {
    *("task_type", "auto_mapping", "peft_version", "inference_mode", "megatron_core", "qalora_group_size"),
    *("layers_pattern", "bias", "lora_bias", "fan_in_fan_out", "ensure_weight_tying"),
    *("eva_config", "corda_config", "lora_ga_config", "loftq_config"),
}
"""Keys of PEFT that say nothing which the tensors, the model and init_lora_weights do not say."""


# ---- names --------------------------------------------------------------------------------------------------------


def parameters(adapter: Adapter) -> dict[str, nn.Parameter]:
    """PEFT's name -> the adapter's parameter. What is tied has both its names, except for the rows of new tokens."""
    found: dict[str, nn.Parameter] = {}
    common = {id(p) for p in adapter.shared.values()}
    for name, layer in adapter.layers.items():
        own = {key: p for key, p in layer.own_tensors().items() if id(p) not in common}
        found |= {delta_name(name, layer.base, key): p for key, p in own.items()}
    found |= {f"{SHARED}{key}": p for key, p in adapter.shared.items()}
    return found | beside(adapter)


def on_disk(adapter: Adapter) -> dict[str, Tensor]:
    """PEFT's name -> what is saved, as trained: the adapter's tensors, or what they are packed into."""
    found: dict[str, Tensor] = {key: p.detach() for key, p in parameters(adapter).items()}
    for name, layer in adapter.layers.items():
        if (packed := layer.delta.packed()) is not None:
            own = {delta_name(name, layer.base, key) for key, _ in layer.delta.named_parameters()}
            found = {key: tensor for key, tensor in found.items() if key not in own}
            found |= {delta_name(name, layer.base, key): tensor for key, tensor in packed.items()}
    return found


def take(adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Copy into an adapter what `on_disk` gave, or as much of it as there is."""
    for name, layer in adapter.layers.items():
        names = {key: delta_name(name, layer.base, key) for key in layer.delta.packed() or ()}
        if names:
            layer.delta.unpack({key: tensors[stored] for key, stored in names.items()})
    for key, parameter in parameters(adapter).items():
        if key in tensors:
            parameter.copy_(tensors[key])


def beside(adapter: Adapter, without: Container[str] = ()) -> dict[str, nn.Parameter]:
    """PEFT's name -> what is trained beside ΔW, but `without`: rows of new tokens, and parameters in full."""
    rows = {rows_name(end): adapter.rows[end].values for end in row_ends(adapter.plan)}
    wrapped = {*adapter.layers, *adapter.ends}
    return rows | {also_name(name, wrapped): p for name, p in adapter.also.items() if name not in without}


def shapes(plan: Plan, model: nn.Module) -> dict[str, tuple[int, ...]]:
    """PEFT's name -> the shape it has to have on this model, which is plain."""
    found: dict[str, tuple[int, ...]] = {}
    for spec in plan.layers:
        base, each = base_of(model, spec.name), saved_shapes(spec, plan.method)
        each |= {"bias": (spec.out_features,)} if plan.lora_bias else {}
        found |= {delta_name(spec.name, base, key): shape for key, shape in each.items()}
    found |= {f"{SHARED}{key}": shape for key, shape in plan.shared.items()}
    known = plain_parameters(model)
    for end in row_ends(plan):
        found[rows_name(end)] = (len(plan.new_rows), known[f"{end}.weight"].shape[1])
    wrapped = {*(spec.name for spec in plan.layers), *row_ends(plan)}
    return found | {also_name(name, wrapped): tuple(known[name].shape) for name in plan.also}


def as_peft_has_it(plan: Plan, model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as PEFT has them: convolutions in their shapes, experts together. The model is plain."""
    kept = dict(tensors)
    for spec in plan.layers:
        base = base_of(model, spec.name)
        for key in LINEAR:
            name = delta_name(spec.name, base, key)
            if name in kept:
                kept[name] = base.as_stored(key, kept[name])
    return expert_format.together(plan, kept, PREFIX) if is_peft(plan, model) else kept


def delta_name(layer: str, base: Base, key: str) -> str:
    """Where a tensor of ΔW is on disk; tensors that PEFT's LoRA does not have keep our name."""
    return f"{PREFIX}{layer}.{(LOOKUP if base.reads_ids else LINEAR).get(key, key)}"


def rows_name(end: str) -> str:
    """Where the rows of new tokens are on disk."""
    return f"{PREFIX}{end}.{ROWS}"


def also_name(parameter: str, wrapped: Iterable[str]) -> str:
    """Where a parameter that is trained in full is on disk."""
    owner, _, key = parameter.rpartition(".")
    return f"{PREFIX}{owner}.{'base_layer.' if owner in wrapped else ''}{key}"


def taken(layer: str, factors: tuple[Tensor, Tensor] | None) -> dict[str, Tensor]:
    """Name on disk -> what was added to W0 of a layer before it was quantised."""
    named = {} if factors is None else {"B": factors[0], "A": factors[1]}
    return {f"{PREFIX}{layer}.{TAKEN}{key}": factor for key, factor in named.items()}


def taken_of(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Layer -> its `A` and `B` of these among the tensors of an adapter."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, _, name = key.removeprefix(PREFIX).rpartition(f".{TAKEN}")
        if layer:
            found.setdefault(layer, {})[name] = tensor
    return found


def row_ends(plan: Plan) -> list[str]:
    """The modules whose rows are on disk: tied ends share theirs."""
    ends = [plan.ends.embeddings] if plan.ends.tied else [plan.ends.embeddings, plan.ends.head]
    return ends if plan.new_rows else []


def layer_of(key: str) -> str | None:
    """The adapted layer that a key of PEFT's LoRA belongs to; None when it is no factor."""
    for ending in (*LINEAR.values(), *LOOKUP.values()):
        if key.startswith(PREFIX) and key.endswith(f".{ending}"):
            return key.removeprefix(PREFIX).removesuffix(f".{ending}")
    return None


def parameter_of(key: str) -> str:
    """The parameter of the plain model that a key which is no factor stands for."""
    return key.removeprefix(PREFIX).replace(".base_layer.", ".")


def plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a plain model; tied ones under both names."""
    return dict(model.named_parameters(remove_duplicate=False))


def base_of(model: nn.Module, layer: str) -> Base:
    """The view of a plain layer."""
    kind = kind_of(model, layer)
    assert kind is not None, f"{layer} cannot be adapted"
    return kind[1]


def kind_of(model: nn.Module, layer: str) -> tuple[str, Base] | None:
    """Name and view of a plain layer; None when there is no such layer or it cannot be adapted."""
    try:
        return view_of(model.get_submodule(layer))
    except AttributeError:
        return None


# ---- config -------------------------------------------------------------------------------------------------------


def is_peft(plan: Plan, model: nn.Module) -> bool:
    """Whether PEFT's LoRA computes the same function; the model is plain."""
    return (
        plan.method.delta.name == "lowrank"
        and plan.method.combine.name in ("add", "dora")
        and bool(plan.layers)
        and expert_format.fits(plan, model)
        and not plan.taken
    )


def config_of(plan: Plan, model: nn.Module, base: str, revision: str | None) -> dict[str, Any]:
    """The LoraConfig with which PEFT computes the same function."""
    rslora = plan.method.scale.name == "rslora"
    ranks = {spec.name: spec.r for spec in plan.layers}
    alphas = {spec.name: _alpha(spec, rslora) for spec in plan.layers}
    r, alpha = _most_common(ranks, 8), _most_common(alphas, 8)
    return {
        "peft_type": LORA if is_peft(plan, model) else OURS,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": plan.method.dropout.settings.get("p", 0.0),
        "use_rslora": rslora,
        "use_dora": plan.method.combine.name == "dora",
        "lora_bias": plan.lora_bias,
        "bias": "all" if _loose_biases(plan) else "none",
        "target_modules": _targets(ranks.keys() - {spec.name for spec in expert_format.adapted(plan)}, model),
        "target_parameters": sorted(expert_format.parameters(plan)) or None,
        "rank_pattern": _pattern(ranks, r),
        "alpha_pattern": _pattern(alphas, alpha),
        "modules_to_save": _whole_modules(plan) or None,
        "trainable_token_indices": {end: list(plan.new_rows) for end in row_ends(plan)} or None,
        "init_lora_weights": True,
        "fan_in_fan_out": any(spec.base == "conv1d" for spec in plan.layers),
    }


def _alpha(spec: LayerSpec, rslora: bool) -> float:
    """The alpha that gives PEFT the layer's scale: s = alpha/r, or alpha/√r with rslora."""
    over = math.sqrt(spec.r) if rslora else spec.r
    alpha = spec.alpha if spec.alpha / over == spec.scale else spec.scale * over
    return int(alpha) if alpha.is_integer() else alpha


def _most_common(values: Mapping[str, Any], default: Any) -> Any:
    return Counter(values.values()).most_common(1)[0][0] if values else default


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """What differs from the default: by the last piece of the name where all such layers agree, else by name."""
    by_ending: dict[str, set[Any]] = {}
    for name, value in values.items():
        by_ending.setdefault(_ending(name), set()).add(value)
    other = {name: value for name, value in values.items() if value != default}
    return {
        _ending(name) if len(by_ending[_ending(name)]) == 1 else name: value for name, value in other.items()
    }


def _targets(names: Iterable[str], model: nn.Module) -> list[str]:
    """Last pieces of the names where they pick exactly the planned layers, else the whole names."""
    names = set(names)
    endings = {_ending(name) for name in names}
    picked = {name for name, _ in model.named_modules() if _ending(name) in endings}
    return sorted(endings if picked == names else names)


def _ending(name: str) -> str:
    return name.rpartition(".")[2]


def _whole_modules(plan: Plan) -> list[str]:
    """Modules that are trained in full, the outermost ones: PEFT saves whole modules."""
    not_whole = {*_loose_biases(plan), *(f"{spec.name}.weight" for spec in plan.layers)}
    owners = {name.rpartition(".")[0] for name in plan.also if name not in not_whole}
    return sorted(name for name in owners if not any(name.startswith(f"{other}.") for other in owners))


def _loose_biases(plan: Plan) -> list[str]:
    """Biases trained without the weight beside them."""
    also = set(plan.also)
    return [n for n in plan.also if n.endswith(".bias") and f"{n.rpartition('.')[0]}.weight" not in also]
