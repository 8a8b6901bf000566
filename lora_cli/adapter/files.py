"""Adapter folder <-> Adapter, in PEFT's format, so that everything that reads PEFT's adapters reads ours.

adapter_model.safetensors   base_model.model.<module>.lora_A.weight [r, in], .lora_B.weight [out, r] ...
adapter_config.json         PEFT's LoraConfig
lora.json                   what PEFT has no place for: our parts, the added tokens, the base's fingerprint
"""

import dataclasses
import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_cli import __version__, io_ops, parts
from lora_cli.adapter.inject import Adapter
from lora_cli.adapter.plan import Ends, LayerSpec, Plan, view_of
from lora_cli.errors import ExitCode, UserError
from lora_cli.parts import Part
from lora_cli.presets import Method

WEIGHTS, CONFIG, OURS = "adapter_model.safetensors", "adapter_config.json", "lora.json"
PREFIX = "base_model.model."
LINEAR = {"A": "lora_A.weight", "B": "lora_B.weight", "bias": "lora_B.bias"}
LOOKUP = {"A": "lora_embedding_A", "B": "lora_embedding_B"}
ROWS = "token_adapter.trainable_tokens_delta"

NEUTRAL_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")
"""Starts that leave the base as it is; the others mean that the adapter fits a changed base only."""
UNDERSTOOD = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *(
        "inference_mode",
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "fan_in_fan_out",
    ),
    *("bias", "lora_bias", "use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform"),
    *("layers_pattern", "rank_pattern", "alpha_pattern", "trainable_token_indices", "ensure_weight_tying"),
    *("megatron_core", "qalora_group_size"),
}
"""PEFT's keys that this file knows; any other with a value asks for something that would not be computed."""


@dataclass(frozen=True)
class Saved:
    """An adapter on disk."""

    folder: Path
    config: dict[str, Any]
    ours: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def base(self) -> str | None:
        """The base's folder or Hub id."""
        return self.config.get("base_model_name_or_path")


def save(
    folder: Path, adapter: Adapter, base: str, revision: str | None, tokens: tuple[str, ...] = ()
) -> None:
    """Write weights and configs into `folder`, which exists (a temporary one that the caller puts in place)."""
    save_file(peft_tensors(adapter), folder / WEIGHTS, metadata={"format": "pt"})
    io_ops.write_json(folder / CONFIG, peft_config(adapter, base, revision))
    method = adapter.plan.method
    io_ops.write_json(
        folder / OURS,
        {
            "lora_version": __version__,
            "method": method.name,
            "parts": {axis: dataclasses.asdict(part) for axis, part in method.chosen().items()},
            "add_tokens": list(tokens),
            "base_fingerprint": fingerprint(adapter.model, adapter.plan),
        },
    )


def read(folder: Path) -> Saved:
    """Read an adapter folder that this tool or PEFT wrote.

    Raises:
        UserError: it is not one, is damaged, or needs something that is not computed here.
    """
    config = _json(folder / CONFIG)
    ours = _json(folder / OURS) if (folder / OURS).exists() else {}
    if config.get("peft_type") != "LORA":
        what = f"peft_type {config.get('peft_type')!r} is not known"
        raise UserError(what, where=str(folder / CONFIG), fix="known: LORA", code=ExitCode.MODEL)
    _refuse_unknown(config, folder)
    return Saved(folder, config, ours, _tensors(folder / WEIGHTS))


def plan_of(saved: Saved, model: nn.Module, ends: Ends) -> Plan:
    """The plan that the saved tensors fit, checked against the model's shapes.

    Raises:
        UserError: a tensor fits no module, or has another shape.
    """
    keys = [key.removeprefix(PREFIX) for key in saved.tensors]
    layers = [name for name in dict.fromkeys(map(_layer_of, keys)) if name is not None]
    specs = tuple(_spec(name, saved, model) for name in layers)
    also = tuple(_plain(key) for key in keys if _is_also(key) and not _is_unchanged(key, saved, model))
    known = dict(model.named_parameters(remove_duplicate=False))
    foreign = [name for name in also if name not in known]
    if foreign:
        raise _mismatch(saved, f"the model has no parameter {foreign[0]}")
    wrong = [n for n in also if known[n].shape != saved.tensors[_key_of(n, saved)].shape]
    if wrong:
        raise _mismatch(saved, f"{wrong[0]} has another shape in the model")
    rows = _row_ids(saved)
    bias = any(key.endswith(LINEAR["bias"]) for key in keys)
    return Plan(_method_of(saved), specs, bias, also, rows, ends)


def fill(adapter: Adapter, saved: Saved) -> None:
    """Copy the saved tensors into an injected adapter; every tensor has to find its place."""
    expected = _places(adapter)
    left = {key for key in saved.tensors if not _is_unchanged(key, saved, adapter.model)} - expected.keys()
    missing = expected.keys() - saved.tensors.keys()
    if left or missing:
        raise _mismatch(saved, f"{len(missing)} tensors are missing, {len(left)} fit nowhere")
    with torch.no_grad():
        for key, parameter in expected.items():
            if parameter.shape != saved.tensors[key].shape:
                raise _mismatch(saved, f"{key} has shape {tuple(saved.tensors[key].shape)}")
            parameter.copy_(saved.tensors[key])
    theirs = saved.ours.get("base_fingerprint")
    if theirs and theirs != fingerprint(adapter.model, adapter.plan):
        raise _mismatch(saved, "it was trained on a base with other weights")


def peft_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors by PEFT's names, contiguous and none sharing memory with another."""
    return {key: p.detach().cpu().contiguous().clone() for key, p in _places(adapter).items()}


def peft_config(adapter: Adapter, base: str, revision: str | None) -> dict[str, Any]:
    """PEFT's LoraConfig for which PEFT computes the same function."""
    plan = adapter.plan
    rslora = plan.method.scale.name == "rslora"
    r = _most_common([spec.r for spec in plan.layers], 8)
    alphas = {spec.name: _peft_alpha(spec, rslora) for spec in plan.layers}
    alpha = _most_common(list(alphas.values()), 8)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": plan.method.dropout.settings.get("p", 0.0),
        "use_rslora": rslora,
        "lora_bias": plan.lora_bias,
        "bias": "all" if _loose_biases(plan) else "none",
        "target_modules": _targets(plan, adapter.model),
        "rank_pattern": {spec.name: spec.r for spec in plan.layers if spec.r != r},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "modules_to_save": _whole_modules(plan) or None,
        "trainable_token_indices": _token_indices(plan),
        "init_lora_weights": True,
        "fan_in_fan_out": any(spec.base == "conv1d" for spec in plan.layers),
    }


def fingerprint(model: nn.Module, plan: Plan) -> str:
    """A short hash over a sample of every adapted W0, the same whether it is kept in float32 or bfloat16."""
    digest = hashlib.sha256()
    for spec in plan.layers:
        flat = model.get_submodule(spec.name).get_parameter("base_layer.weight").detach().flatten()
        sample = flat[:: max(flat.numel() // 64, 1)].to(torch.bfloat16).float().cpu()
        digest.update(f"{spec.name}:{spec.in_features}x{spec.out_features}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:32]


# ---- names -----------------------------------------------------------------------------------------------------


def _places(adapter: Adapter) -> dict[str, nn.Parameter]:
    """PEFT's name -> our parameter."""
    found: dict[str, nn.Parameter] = {}
    for layer, delta in adapter.deltas.items():
        names = LOOKUP if adapter.model.get_submodule(layer).base.reads_ids else LINEAR
        found |= {f"{PREFIX}{layer}.{names[key]}": p for key, p in delta.named_parameters()}
    for end, rows in adapter.rows.items():
        if not (adapter.plan.ends.tied and end == adapter.plan.ends.head):
            found[f"{PREFIX}{end}.{ROWS}"] = rows.values
    wrapped = {*adapter.deltas, *adapter.rows}
    for name, parameter in adapter.also.items():
        owner, _, key = name.rpartition(".")
        found[f"{PREFIX}{owner}.{'base_layer.' if owner in wrapped else ''}{key}"] = parameter
    return found


def _layer_of(key: str) -> str | None:
    """The adapted module that a key belongs to."""
    for ending in (*LINEAR.values(), *LOOKUP.values()):
        if key.endswith(f".{ending}"):
            return key.removesuffix(f".{ending}")
    return None


def _is_also(key: str) -> bool:
    return _layer_of(key) is None and not key.endswith(ROWS)


def _plain(key: str) -> str:
    """The parameter of the plain model that a key of `train_also` stands for."""
    return key.replace(".base_layer.", ".")


def _key_of(parameter: str, saved: Saved) -> str:
    return next(key for key in saved.tensors if _plain(key.removeprefix(PREFIX)) == parameter)


def _is_unchanged(key: str, saved: Saved, model: nn.Module) -> bool:
    """Whether it is the base's own weight, which PEFT saves beside an adapted embedding."""
    name = key.removeprefix(PREFIX)
    if not name.endswith(".base_layer.weight"):
        return False
    module = model.get_submodule(name.removesuffix(".base_layer.weight"))
    weight, stored = module.weight, saved.tensors[f"{PREFIX}{name}"]
    return weight.shape == stored.shape and torch.equal(weight.detach().cpu().float(), stored.float())


def _row_ids(saved: Saved) -> tuple[int, ...]:
    """Token ids of the trained rows: a list for the embedding, or a mapping module -> list."""
    ids = saved.config.get("trainable_token_indices") or []
    lists = list(ids.values()) if isinstance(ids, dict) else [ids]
    if any(each != lists[0] for each in lists):
        raise _mismatch(saved, "embeddings and head train different tokens, which is not supported")
    return tuple(lists[0])


# ---- PEFT's config from a plan ------------------------------------------------------------------------------------


def _peft_alpha(spec: LayerSpec, rslora: bool) -> float:
    """The alpha that gives PEFT the layer's scale: s = alpha/r, or alpha/√r with rslora."""
    alpha = spec.alpha if rslora else spec.scale * spec.r
    return int(alpha) if float(alpha).is_integer() else alpha


def _most_common(values: list[Any], default: Any) -> Any:
    return Counter(values).most_common(1)[0][0] if values else default


def _targets(plan: Plan, model: nn.Module) -> list[str]:
    """Last pieces of the names where they pick exactly the planned layers, else the whole names."""
    names = {spec.name for spec in plan.layers}
    endings = {name.rpartition(".")[2] for name in names}
    picked = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in endings}
    picked = {name for name in picked if not name.endswith(".base_layer") and ".deltas" not in name}
    return sorted(endings if picked == names else names)


def _whole_modules(plan: Plan) -> list[str]:
    """Modules whose every parameter is trained in full; PEFT saves whole modules."""
    loose = set(_loose_biases(plan))
    return sorted({name.rpartition(".")[0] for name in plan.also if name not in loose})


def _loose_biases(plan: Plan) -> list[str]:
    """Biases trained without the weight beside them."""
    also = set(plan.also)
    return [n for n in plan.also if n.endswith(".bias") and f"{n.rpartition('.')[0]}.weight" not in also]


def _token_indices(plan: Plan) -> Any:
    if not plan.new_rows:
        return None
    ends = [plan.ends.embeddings] if plan.ends.tied else [plan.ends.embeddings, plan.ends.head]
    return {end: list(plan.new_rows) for end in ends}


# ---- a plan from PEFT's config ------------------------------------------------------------------------------------


def _method_of(saved: Saved) -> Method:
    if "parts" in saved.ours:
        chosen = {axis: Part(**part) for axis, part in saved.ours["parts"].items()}
        return Method(name=saved.ours.get("method", "lora"), **chosen)
    scale = Part(name="rslora" if saved.config.get("use_rslora") else "alpha_over_r")
    dropout = Part(name="standard", settings={"p": float(saved.config.get("lora_dropout") or 0.0)})
    return Method(name="lora", scale=scale, dropout=dropout)


def _spec(name: str, saved: Saved, model: nn.Module) -> LayerSpec:
    try:
        view = view_of(model.get_submodule(name))
    except AttributeError as error:
        raise _mismatch(saved, f"the model has no module {name}") from error
    if view is None:
        raise _mismatch(saved, f"{name} is not a layer that can be adapted")
    kind, base = view
    names = LOOKUP if base.reads_ids else LINEAR
    try:
        A, B = (saved.tensors[f"{PREFIX}{name}.{names[key]}"] for key in ("A", "B"))
    except KeyError as error:
        raise _mismatch(saved, f"{name} lacks one of its two factors") from error
    r = A.shape[0]
    if A.shape != (r, base.in_features) or B.shape != (base.out_features, r):
        shapes = f"A {tuple(A.shape)}, B {tuple(B.shape)} for a layer {base.out_features}×{base.in_features}"
        raise _mismatch(saved, f"{name}: {shapes}")
    alpha = _alpha_of(name, saved.config)
    rule = "rslora" if saved.config.get("use_rslora") else "alpha_over_r"
    scale = parts.load("scale", rule).scale(alpha, r)
    return LayerSpec(name, kind, base.in_features, base.out_features, r, alpha, scale, A.numel() + B.numel())


def _alpha_of(name: str, config: dict[str, Any]) -> float:
    """PEFT's rule: the first pattern that matches the end of the name."""
    import re

    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return float(value)
    return float(config.get("lora_alpha", 8))


def _refuse_unknown(config: dict[str, Any], folder: Path) -> None:
    asked = sorted(key for key, value in config.items() if key not in UNDERSTOOD and value)
    where = str(folder / CONFIG)
    if asked:
        raise UserError(
            f"uses {', '.join(asked)}, which is not computed here", where=where, code=ExitCode.MODEL
        )
    if config.get("init_lora_weights", True) not in NEUTRAL_INITS:
        raise UserError(
            f"was started with '{config['init_lora_weights']}', which changes the base",
            where=where,
            fix="save it from PEFT with path_initial_model_for_weight_conversion, which makes it fit the original",
            code=ExitCode.MODEL,
        )


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        fix = "an adapter folder holds adapter_config.json and adapter_model.safetensors"
        raise UserError("there is no such file", where=str(path), fix=fix, code=ExitCode.MODEL) from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read: {error}", where=str(path), code=ExitCode.MODEL) from error
    if not isinstance(value, dict):
        raise UserError("is not a JSON object", where=str(path), code=ExitCode.MODEL)
    return value


def _tensors(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        pickled = path.with_name("adapter_model.bin").exists()
        fix = "save it again as safetensors; pickles are never opened" if pickled else ""
        raise UserError("there is no such file", where=str(path), fix=fix, code=ExitCode.MODEL)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise UserError(f"is damaged: {error}", where=str(path), code=ExitCode.MODEL) from error
    if not tensors:
        raise UserError("holds no tensors", where=str(path), code=ExitCode.MODEL)
    return tensors


def _mismatch(saved: Saved, what: str) -> UserError:
    fix = f"it was made for {saved.base}" if saved.base else ""
    return UserError(
        f"does not fit this model: {what}", where=str(saved.folder), fix=fix, code=ExitCode.MODEL
    )
