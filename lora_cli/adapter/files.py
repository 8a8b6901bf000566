"""Adapter folder <-> Adapter, in PEFT's format, so that everything that reads PEFT's adapters reads ours.

adapter_model.safetensors   the tensors, see peft_format
adapter_config.json         PEFT's LoraConfig
lora.json                   what PEFT has no place for: our parts, the added tokens, the base's fingerprint
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from lora_cli import __version__, io_ops, parts
from lora_cli.adapter import expert_format, peft_format
from lora_cli.adapter.base import SIGNS
from lora_cli.adapter.base import signs as signs_of
from lora_cli.adapter.inject import Adapter, without_adapters
from lora_cli.adapter.peft_format import PREFIX, ROWS, rows_name
from lora_cli.adapter.plan import Ends, LayerSpec, Plan, to_quantise
from lora_cli.adapter.portable import FILLED, LOWRANK, Portable, saved_form
from lora_cli.adapter.quantised import Quantised
from lora_cli.adapter.saved import CONFIG, OURS, WEIGHTS, Ours, Saved, read
from lora_cli.errors import ExitCode, UserError
from lora_cli.presets import Method
from lora_cli.recipe.load import settings_of
from lora_cli.recipe.schema import Part

__all__ = [
    "CONFIG",
    "Saved",
    "fill",
    "fingerprint",
    "method_of",
    "note_signs",
    "plan_of",
    "read",
    "save",
    "taken_of",
    "write",
]


def save(
    folder: Path,
    adapter: Adapter,
    base: str,
    revision: str | None,
    tokens: tuple[str, ...] = (),
    form: Portable | None = None,
) -> None:
    """Write weights and configs into `folder`, which exists (a temporary one that the caller puts in place).

    Args:
        folder: where.
        adapter: what.
        base: folder or Hub id of its base.
        revision: of the base.
        tokens: those that were added to the base's vocabulary.
        form: what `saved_form` gives, where it has been asked already.
    """
    form = form or saved_form(adapter)
    with without_adapters(adapter):
        write(folder, form, adapter.model, base, revision, tokens, adapter.codes)


def write(
    folder: Path,
    form: Portable,
    model: nn.Module,
    base: str,
    revision: str | None,
    tokens: tuple[str, ...],
    codes: str | None,
) -> None:
    """The same for an adapter in the form in which it is to be saved; the model is plain, and has these codes."""
    plan = form.plan
    tensors = peft_format.as_peft_has_it(plan, model, form.tensors)
    io_ops.write_bytes(folder / WEIGHTS, to_bytes(tensors, metadata={"format": "pt"}))
    io_ops.write_json(folder / CONFIG, peft_format.config_of(plan, model, base, revision))
    ours = Ours(
        lora_version=__version__,
        method=plan.method.name,
        parts=plan.method.chosen(),
        add_tokens=tokens,
        base_fingerprint=fingerprint(model, plan),
        split_experts=expert_format.are_apart(plan, model),
        layers=() if peft_format.is_peft(plan, model) else tuple(spec.name for spec in plan.layers),
        codes=codes,
        codes_of=_quantised_from(model) if plan.quantised else None,
        formats={name: part.settings for name, part in plan.quantised.items() if part.settings},
    )
    io_ops.write_json(folder / OURS, ours.model_dump(mode="json"))


def _quantised_from(model: nn.Module) -> str | None:
    layers = (layer for layer in model.modules() if isinstance(layer, Quantised))
    return next((str(layer.dtype).removeprefix("torch.") for layer in layers), None)


def plan_of(saved: Saved, model: nn.Module, ends: Ends, weights: Mapping[str, Tensor] | None = None) -> Plan:
    """The plan that the saved tensors fit, checked against the model: every name, every shape, and the base.

    Args:
        saved: what `read` gave.
        model: plain; no other adapter is active on it.
        ends: its embeddings and its output head.
        weights: parameter name -> its content, where the model is on the meta device.

    Raises:
        UserError: a tensor is missing, fits nowhere or has another shape, or the base is another one.
    """
    known = peft_format.plain_parameters(model)
    taken = taken_of(saved, model)
    gone = {key for name in taken for key in peft_format.taken(name, taken[name])}
    contents = known if weights is None else weights
    tensors = {key: t for key, t in saved.tensors.items() if not _is_the_bases(key, t, known, contents)}
    tensors = {key: t for key, t in tensors.items() if key not in gone}
    saved = replace(saved, tensors=tensors)
    ends = replace(ends, tied=ends.tied and _stay_tied(saved, ends))
    layers = tuple(_spec(name, saved, model) for name in _layers(saved, model))
    bias = any(key.endswith(peft_format.LINEAR["bias"]) for key in tensors)
    plan = Plan(method_of(saved), layers, bias, (), _row_ids(saved, ends, known), ends, taken=bool(taken))
    factors = peft_format.shapes(plan, model)
    others = {peft_format.parameter_of(key) for key in tensors.keys() - factors.keys()}
    also = tuple(name for name in known if name in others)
    plan = replace(plan, also=also, quantised=_formats(saved, to_quantise(plan.method, model, ends, also)))
    _check_tensors(saved, peft_format.shapes(plan, model))
    theirs = saved.ours.base_fingerprint
    if theirs is not None and theirs != fingerprint(model, plan, weights):
        raise saved.mismatch("it was trained on a base with other weights")
    return plan


def taken_of(saved: Saved, model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> (B, A) of what was added to its W0 before it was quantised.

    Raises:
        UserError: there is no such layer, or one of both is missing or has another shape.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, factors in peft_format.taken_of(saved.tensors).items():
        kind = peft_format.kind_of(model, name)
        shapes = {key: tuple(factor.shape) for key, factor in factors.items()}
        r = factors["A"].shape[0] if factors.keys() == {"A", "B"} and factors["A"].ndim == 2 else 0
        if kind is None or shapes != {"A": (r, kind[1].in_features), "B": (kind[1].out_features, r)}:
            raise saved.mismatch(f"what was taken off {name} is not of its shape: {shapes}")
        found[name] = factors["B"], factors["A"]
    return found


def fill(adapter: Adapter, saved: Saved) -> None:
    """Copy the saved tensors into an adapter that was injected by their plan."""
    with torch.no_grad():
        # An untied end without rows of its own keeps those it starts with, which are the base's; what was taken off W0
        # is there already.
        peft_format.take(adapter, saved.tensors)


def fingerprint(model: nn.Module, plan: Plan, weights: Mapping[str, Tensor] | None = None) -> str:
    """A short hash over the shapes of every adapted W0 and the signs of a sample of its weights.

    Signs survive every rounding, so a base has one fingerprint in float32, bfloat16 and float16; other weights have
    other signs.
    """
    digest = hashlib.sha256()
    for spec in sorted(plan.layers, key=lambda spec: spec.name):
        base = peft_format.base_of(model, spec.name)
        signs = base.signs() if weights is None else signs_of(weights[f"{spec.name}.weight"])
        digest.update(f"{spec.name}:{spec.in_features}x{spec.out_features}".encode())
        digest.update(signs.cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def note_signs(model: nn.Module, plan: Plan) -> None:
    """Note what the fingerprint is made of: of a base that is shared out, no process has all of it to look at."""
    for spec in plan.layers:
        signs = peft_format.base_of(model, spec.name).signs()
        model.get_submodule(spec.name).register_buffer(SIGNS, signs, persistent=False)


# ---- a plan from tensors and config -------------------------------------------------------------------------------


def method_of(saved: Saved) -> Method:
    """Our parts, with their settings checked; for an adapter of PEFT what its config says.

    Raises:
        UserError: they are not known here.
    """
    if not saved.ours.parts:
        scale = Part(name="rslora" if saved.config.use_rslora else "alpha_over_r")
        dropout = Part(name="standard", settings={"p": saved.config.lora_dropout})
        combine = Part(name="dora" if saved.config.use_dora else "add")
        return Method(name="lora", combine=combine, scale=scale, dropout=dropout)
    try:
        for axis, found in saved.ours.parts.items():
            for part in found:
                settings_of(axis, part.name).model_validate(part.settings)
        single = {axis: found[0] for axis, found in saved.ours.parts.items() if axis != "lifecycle"}
        lifecycle = saved.ours.parts.get("lifecycle", ())
        # How it was trained is over: what is loaded is used as it is.
        used = {axis: part for axis, part in single.items() if axis not in ("init", "rank", "optimizer")}
        if "delta" in used and used["delta"].name != LOWRANK:
            used["init"] = FILLED
        return Method(name=saved.ours.method, lifecycle=lifecycle, **used)
    except (ValidationError, TypeError) as error:
        what, fix = f"lora {__version__} does not know its parts", f"lora {saved.ours.lora_version} wrote it"
        raise UserError(what, where=str(saved.folder / OURS), fix=fix, code=ExitCode.MODEL) from error


def _formats(saved: Saved, quantised: Mapping[str, Part]) -> dict[str, Part]:
    """What each layer was quantised to when it was trained."""
    known, found = saved.ours.formats, dict(quantised)
    for name, part in quantised.items():
        if known and known.get(name) not in getattr(parts.load("base", part.name), "FORMATS", ()):
            raise saved.mismatch(
                f"lora.json has no format for {name} that {part.name} has: {known.get(name)}"
            )
        found[name] = Part(name=part.name, settings=dict(known.get(name, {})))
    return found


def _layers(saved: Saved, model: nn.Module) -> list[str]:
    """The adapted layers, in the model's order."""
    named = map(peft_format.layer_of, saved.tensors)
    wanted = set(saved.ours.layers) or {name for name in named if name is not None}
    absent = sorted(name for name in wanted if peft_format.kind_of(model, name) is None)
    if absent:
        what = f"{len(absent)} of {len(wanted)} adapted layers are not in it, such as {absent[0]}"
        raise saved.mismatch(what)
    names = [name for name, _ in model.named_modules()]
    lost = [name for name in names if name not in wanted and saved.config.surely_adapts(name)]
    lost = [name for name in lost if peft_format.kind_of(model, name) is not None]
    if lost:
        raise saved.mismatch(f"it has no tensors for {len(lost)} layers, such as {lost[0]}")
    return [name for name in names if name in wanted]


def _spec(name: str, saved: Saved, model: nn.Module) -> LayerSpec:
    kind = peft_format.kind_of(model, name)
    assert kind is not None, "absent layers are refused before"
    base = kind[1]
    try:
        r, alpha = saved.config.shape_of(name)
    except re.error as error:
        what, where = f"a pattern is not a regular expression: {error}", str(saved.folder / CONFIG)
        raise UserError(what, where=where, code=ExitCode.MODEL) from error
    scale = parts.load("scale", "rslora" if saved.config.use_rslora else "alpha_over_r").scale(alpha, r)
    count = sum(t.numel() for key, t in saved.tensors.items() if key.startswith(f"{PREFIX}{name}."))
    return LayerSpec(name, kind[0], base.in_features, base.out_features, r, alpha, scale, count)


def _row_ids(saved: Saved, ends: Ends, known: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Token ids of the trained rows: in the config a list, for the embeddings, or a mapping module -> list."""
    keys = [key for key in saved.tensors if key.endswith(ROWS)]
    modules = [key.removeprefix(PREFIX).removesuffix(f".{ROWS}") for key in keys]
    asked = saved.config.trainable_token_indices
    if asked and not modules:
        raise saved.mismatch("it has no tensors for trainable_token_indices")
    foreign = [name for name in modules if name not in (ends.embeddings, ends.head)]
    if foreign:
        raise saved.mismatch(f"it trains rows of {foreign[0]}, which is neither the embeddings nor the head")
    found = {tuple(_ids_of(name, asked)) for name in modules}
    if len(found) > 1:
        raise saved.mismatch("it trains other tokens in the embeddings than in the head")
    ids = found.pop() if found else ()
    if ids and max(ids) >= (size := known[f"{ends.embeddings}.weight"].shape[0]):
        raise saved.mismatch(f"it trains token {max(ids)}, the vocabulary has {size} rows")
    return ids


def _ids_of(module: str, asked: list[int] | dict[str, list[int]] | None) -> list[int]:
    if isinstance(asked, dict):
        return next((ids for name, ids in asked.items() if module.endswith(name)), [])
    return asked or []


def _is_the_bases(
    key: str, stored: Tensor, known: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> bool:
    """Whether it is the base's own weight, which PEFT saves beside adapted embeddings in whatever type it had."""
    name = peft_format.parameter_of(key)
    if not key.endswith(".base_layer.weight") or name not in known or known[name].shape != stored.shape:
        return False
    weight = weights[name]
    low = min(weight.dtype, stored.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(weight.detach().cpu().to(low), stored.to(low))


def _stay_tied(saved: Saved, ends: Ends) -> bool:
    """Whether this adapter leaves the ends of a tied model one tensor; PEFT trains them apart unless told."""
    stored = {peft_format.parameter_of(key): tensor for key, tensor in saved.tensors.items()}
    weights = [stored[name] for end in (ends.embeddings, ends.head) if (name := f"{end}.weight") in stored]
    apart = len(weights) == 2 and not torch.equal(*weights)
    return not apart and rows_name(ends.head) not in saved.tensors


def _check_tensors(saved: Saved, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Every tensor has its place and every place its tensor, except for the rows of one untied end."""
    given = {key: tuple(tensor.shape) for key, tensor in saved.tensors.items()}
    expected = {key: shape for key, shape in expected.items() if key in given or not key.endswith(ROWS)}
    missing = sorted(expected.keys() - given.keys())
    extra = sorted(given.keys() - expected.keys())
    wrong = sorted(key for key in expected.keys() & given.keys() if expected[key] != given[key])
    found: list[str] = []
    if missing:
        found.append(f"missing tensors: {len(missing)}, such as {missing[0]}")
    if extra:
        found.append(f"tensors that fit nowhere: {len(extra)}, such as {extra[0]}")
    if wrong:
        shapes = f"{given[wrong[0]]} instead of {expected[wrong[0]]}"
        found.append(f"tensors of another shape: {len(wrong)}, such as {wrong[0]}, {shapes}")
    if found:
        raise saved.mismatch("; ".join(found))
