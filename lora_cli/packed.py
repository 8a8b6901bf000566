"""Models that are stored quantised: frozen bases, whose original weights nobody here has seen.

transformers reads what is plain in their files. Where it would put the layers of another library, it leaves places for
ours, which take over the codes, one layer at a time. Ours multiply dequantised weights only: where others would round
the inputs of a layer too, here they stay what they are. Which formats are read: see `methods/base/`, by `reads`.
"""

import copy
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from lora_cli import parts
from lora_cli.adapter.plan import QUANTISED, view_of
from lora_cli.adapter.quantised import Readable
from lora_cli.errors import UserError

OURS = "lora_cli"
"""What transformers calls a model in which places are kept for our layers."""
SKIPPED = ("llm_int8_skip_modules", "modules_to_not_convert", "ignored_layers", "ignore")
"""Where configs name the layers that are plain."""


@dataclass(frozen=True)
class Form:
    """How a model is stored."""

    part: str
    """Which file of `methods/base/` reads it."""
    stored: Mapping[str, Any]
    """What its config says of it."""

    @property
    def kind(self) -> type[Readable]:
        """Our layer."""
        return parts.load("base", self.part).Layer


def readable() -> list[str]:
    """The parts that read what others have stored."""
    return [name for name in parts.names("base") if parts.defines("base", name, "reads")]


def method_of(config: Any) -> str | None:
    """How the config of a model says that it is stored quantised; None where it is not."""
    stored = _settings(config)
    if stored is None:
        return None
    said = [stored.get(key) for key in ("quant_method", "version", "checkpoint_format", "format")]
    return ", ".join(dict.fromkeys(str(each) for each in said if each)) or "not said how"


def form_of(config: Any) -> Form | None:
    """What is stored and who takes it; None where it is not quantised, or in a way that is not read here."""
    stored = _settings(config) or {}
    names = (name for name in readable() if parts.load("base", name).reads(stored))
    return next((Form(name, stored) for name in names), None)


def require(name: str, form: Form) -> None:
    """Say what is missing to read it.

    Raises:
        UserError: a package is not installed.
    """
    try:
        parts.load("base", form.part).require()
    except UserError as error:
        what = f"{name} is stored in {form.part}: {error.what}"
        raise UserError(what, where="model.name", fix=error.fix, code=error.code) from error


def forget(config: Any) -> None:
    """Let a config say nothing of codes: the model that it is of has none, or none that others know."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config


def layers(
    form: Form, plain: PreTrainedModel, types: Mapping[str, torch.dtype]
) -> dict[str, tuple[str, ...]]:
    """Layers that are stored as codes -> the tensors of the files that are theirs, the codes first.

    Args:
        form: how they are stored.
        plain: the same model without weights and unquantised.
        types: of all tensors, by their names in the files.

    Raises:
        ValueError: there are codes of what is no layer of this model, or codes alone.
    """
    found: dict[str, tuple[str, ...]] = {}
    ordered, known, kind = sorted(types), plain.state_dict(keep_vars=True), form.kind
    rename = _renaming(plain, known)
    for name in (each for each in ordered if each.endswith(f".{kind.named}")):
        prefix = name.removesuffix(kind.named)
        begins = islice(ordered, bisect_left(ordered, prefix), None)
        own = {each.removeprefix(prefix): each for each in takewhile(_begins_with(prefix), begins)}
        beside = [each for key, each in own.items() if key.startswith(kind.beside)]
        if not beside:
            continue
        layer = _layer_of(plain, known, rename(f"{prefix}weight"), name)
        if "bias" in own and f"{layer}.bias" not in known:
            beside.append(own["bias"])  # some write zeros wherever a layer has none
        found[layer] = (name, *beside)
    if not found:
        raise ValueError(f"config.json says that it is stored in {form.part}, and there are no codes")
    used = {each for names in found.values() for each in names}
    for name in (each for each in ordered if each not in used):
        weight = known.get(rename(name))
        if weight is not None and weight.is_floating_point() and not _holds_numbers(types[name]):
            raise ValueError(f"{name} is stored as codes, and what they mean is not")
        if name.rpartition(".")[2].startswith(kind.beside):
            raise ValueError(f"there is {name}, and no codes that it belongs to")
    return found


def _begins_with(prefix: str) -> Callable[[str], bool]:
    return lambda name: name.startswith(prefix)


def _layer_of(plain: PreTrainedModel, known: Mapping[str, Tensor], weight: str, codes: str) -> str:
    """The name of the layer that has a weight, if codes can stand for it."""
    layer = weight.rpartition(".")[0]
    view = view_of(plain.get_submodule(layer)) if weight in known else None
    if view is None or view[0] not in QUANTISED:
        raise ValueError(f"{codes} holds codes of what is no linear layer of this model")
    if sum(each is known[weight] for each in known.values()) > 1:
        raise ValueError(f"{codes} holds codes of what is the weight of another layer, too")
    return layer


def _holds_numbers(dtype: torch.dtype) -> bool:
    """Whether they mean what they are, without scales."""
    return dtype.is_floating_point and dtype.itemsize > 1


def refuse_unsaid(types: Mapping[str, torch.dtype]) -> None:
    """Refuse numbers that scales belong to, in files of which nobody says so.

    Raises:
        ValueError: naming a tensor.
    """
    name = next(
        (name for name, dtype in types.items() if dtype.is_floating_point and dtype.itemsize == 1), None
    )
    if name is not None:
        raise ValueError(f"{name} has 8 bits, and config.json says of no quantization_config what they mean")


def _renaming(plain: PreTrainedModel, known: dict[str, Any]) -> Callable[[str], str]:
    """How transformers calls a parameter that is called so in the files."""
    conversions = get_model_conversion_mapping(plain)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]

    def rename(name: str) -> str:
        found, _ = rename_source_key(name, renamings, converters, plain.base_model_prefix, known)
        return name if found not in known and name in known else found

    return rename


def read(form: Form, plain: nn.Module, stored: Sequence[str], tensor: Callable[[str], Tensor]) -> Readable:
    """One of our layers with codes.

    Args:
        form: how they are stored.
        plain: the layer that was quantised.
        stored: its tensors in the files, the codes first.
        tensor: reads one.

    Raises:
        ValueError: those are no codes for a layer of this shape.
    """
    layer = _stand_in(form, plain)
    inside = len(stored[0]) - len(layer.named)
    saved = {name[inside:]: tensor(name) for name in stored}
    try:
        if "bias" in saved and saved.pop("bias").any():
            raise ValueError("a bias that the model has no place for")
        layer.unpack(saved, form.stored)
    except KeyError as error:
        raise ValueError(f"there is no {error.args[0]}") from error
    except (TypeError, ArithmeticError, RuntimeError) as error:
        raise ValueError("config.json does not say what its codes mean") from error
    return layer


def pretend(skeleton: PreTrainedModel, form: Form) -> None:
    """Put empty quantised layers where a model without weights would have them, as its config says."""
    stored, head = form.stored, skeleton.get_output_embeddings()
    skipped = [each.removeprefix("re:") for key in SKIPPED for each in stored.get(key) or ()]
    for name, module in list(skeleton.named_modules()):
        view = view_of(module)
        left = (module is head and not stored.get("lm_head")) or not should_convert_module(name, skipped)
        if view is not None and view[0] in QUANTISED and not left:
            skeleton.set_submodule(name, _stand_in(form, module))


def _stand_in(form: Form, module: nn.Module) -> Readable:
    view = view_of(module)
    assert view is not None, "only layers that can be adapted are stored quantised"
    return form.kind(view[1])


def _settings(config: Any) -> Mapping[str, Any] | None:
    stored = getattr(config, "quantization_config", None)
    return stored if stored is None or isinstance(stored, dict) else stored.to_dict()


# ---- in transformers ------------------------------------------------------------------------------------------------


class Vacant(nn.Module):
    """Where one of our layers will stand: nothing but the bias is read for it."""

    weight: Tensor

    def __init__(self, plain: nn.Module) -> None:
        """In the place of a layer on the meta device, with whose weight nothing is to be done any more."""
        super().__init__()
        self.register_parameter("bias", plain.bias)  # pyright: ignore[reportArgumentType]
        self.weight = plain.weight.detach()  # pyright: ignore[reportCallIssue] (no parameter, so that none is missing)
        self.weight._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue] (models look through layers)


class Vacancies(QuantizationConfigMixin):
    """For `from_pretrained`: the layers that are not to be read."""

    def __init__(self, names: Collection[str]) -> None:
        """By their names."""
        self.quant_method = OURS  # pyright: ignore[reportAttributeAccessIssue]
        self.names = names


register_quantization_config(OURS)(Vacancies)


@register_quantizer(OURS)
class Vacating(HfQuantizer):
    """Leaves them out."""

    quantization_config: Any
    """`Vacancies`."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        for name in self.quantization_config.names:
            model.set_submodule(name, Vacant(model.get_submodule(name)))

    def is_serializable(self) -> Any:
        """Never asked: see `occupy`."""
        return False

    @property
    def is_trainable(self) -> Any:
        """Never asked either."""
        return False


def unpacked(config: Any) -> Any:
    """The config of such a model as that of a plain one."""
    found = copy.deepcopy(config)
    forget(found)
    return found


def occupy(model: PreTrainedModel, layers: Iterable[tuple[str, Readable]]) -> None:
    """Put layers, each made when it is asked for, where `Vacancies` were, and let the model be a plain one.

    Args:
        model: as transformers loaded it.
        layers: with their names.
    """
    for name, layer in layers:
        layer.bias = model.get_submodule(name).bias  # pyright: ignore[reportAttributeAccessIssue]
        model.set_submodule(name, layer)
    forget(model.config)
    for key in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(key, None)
    model.config.__dict__.pop("_is_quantized", None)
