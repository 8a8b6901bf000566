"""Models that are stored quantised by bitsandbytes: frozen bases, whose original weights nobody here has seen.

transformers reads them; then its layers are exchanged for ours, which hold the same codes. Ours multiply dequantised
weights only: where bitsandbytes would round the inputs of an int8 layer too, here they stay what they are.
"""

import logging
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_cli import parts
from lora_cli.adapter.plan import view_of
from lora_cli.adapter.quantised import Quantised
from lora_cli.errors import ExitCode, UserError

INSTALL = "pip install 'lora-cli[quant]'"
KEPT = {"Linear4bit": "nf4", "Linear8bitLt": "int8"}
"""Types of bitsandbytes -> our part that takes their codes."""


def method_of(config: Any) -> str | None:
    """How the config of a model says that it is stored quantised; None where it is not."""
    stored = _settings(config)
    return None if stored is None else str(stored.get("quant_method") or "not said how")


def format_of(config: Any) -> str | None:
    """Which of our parts takes what is stored; None where it is not quantised, or in a way that is not read here."""
    stored = _settings(config) or {}
    if stored.get("quant_method") != "bitsandbytes":
        return None
    return "nf4" if stored.get("load_in_4bit") else "int8" if stored.get("load_in_8bit") else None


def require(name: str) -> None:
    """Say what is missing to read it.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels that it does not find
    if find_spec("bitsandbytes") is None:
        what, fix = f"{name} is stored quantised by bitsandbytes, which is not installed", INSTALL
        raise UserError(what, where="model.name", fix=fix, code=ExitCode.MODEL)


def adopt(model: PreTrainedModel, plain: nn.Module) -> None:
    """Put our layers in the place of those of bitsandbytes, with their codes, and forget who made them.

    Args:
        model: as transformers loaded it.
        plain: the same model without weights and unquantised, for the kind of each layer.
    """
    dtype = min(
        (p.dtype for p in model.parameters() if p.is_floating_point()), key=lambda kind: kind.itemsize
    )
    found = {name: KEPT.get(type(module).__name__) for name, module in model.named_modules()}
    for name, part in found.items():
        if part is not None:
            layer = _stand_in(part, plain.get_submodule(name))
            layer.adopt(model.get_submodule(name))
            layer.dtype = dtype
            model.set_submodule(name, layer.train(model.training))
    forget(model.config)
    for key in (
        "hf_quantizer",
        "quantization_method",
        "is_loaded_in_4bit",
        "is_loaded_in_8bit",
        "is_quantized",
    ):
        model.__dict__.pop(key, None)
    conversions = model.__dict__.get("_weight_conversions") or []
    model.__dict__["_weight_conversions"] = [each for each in conversions if not _is_of_bitsandbytes(each)]


def forget(config: Any) -> None:
    """Let a config say nothing of codes: the model that it is of has none, or none of bitsandbytes' any more."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config


def _is_of_bitsandbytes(conversion: Any) -> bool:
    """Whether transformers would do it backwards when it saves the model, which has no such codes any more."""
    steps = getattr(conversion, "operations", ())
    return any("bitsandbytes" in type(step).__module__ for step in steps)


def beside(config: Any, name: str, names: Iterable[str]) -> tuple[str, ...]:
    """Those of `names` in the files that belong to the codes `name`; none where it is a plain weight."""
    part, layer = format_of(config), name.removesuffix("weight")
    if part is None or layer == name:
        return ()
    begins = tuple(f"{layer}{each}" for each in parts.load("base", part).Layer.beside)
    return tuple(each for each in names if each.startswith(begins))


def read(part: str, plain: nn.Module, saved: Mapping[str, Tensor]) -> Quantised:
    """One of our layers with the codes that transformers saved, by their names in the layer.

    Raises:
        ValueError: those are no codes for a layer of this shape.
    """
    layer = _stand_in(part, plain)
    layer.unpack(saved)
    return layer


def pretend(skeleton: PreTrainedModel, config: Any) -> None:
    """Put empty quantised layers where a model without weights would have them."""
    part = format_of(config)
    left = (_settings(config) or {}).get("llm_int8_skip_modules") or []
    head = skeleton.get_output_embeddings()
    for name, module in list(skeleton.named_modules()):
        view = view_of(module)
        skipped = module is head or any(name == each or name.endswith(f".{each}") for each in left)
        if part is not None and view is not None and not view[1].reads_ids and not skipped:
            skeleton.set_submodule(name, _stand_in(part, module))


def _stand_in(part: str, module: nn.Module) -> Quantised:
    view = view_of(module)
    assert view is not None, "bitsandbytes exchanges linear layers only"
    return parts.load("base", part).Layer(view[1])


def _settings(config: Any) -> Mapping[str, Any] | None:
    stored = getattr(config, "quantization_config", None)
    return stored if stored is None or isinstance(stored, dict) else stored.to_dict()
