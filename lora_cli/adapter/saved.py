"""An adapter folder, ours or PEFT's, read from disk: safetensors and JSON only, everything foreign checked."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_cli.adapter import expert_format, peft_format
from lora_cli.errors import ExitCode, UserError
from lora_cli.recipe.schema import Part, Section

WEIGHTS, CONFIG, OURS = "adapter_model.safetensors", "adapter_config.json", "lora.json"

Model = TypeVar("Model", bound=BaseModel)


class Ours(Section):
    """lora.json; an adapter that PEFT wrote has none, and these defaults."""

    lora_version: str = ""
    method: str = "lora"
    parts: dict[str, tuple[Part, ...]] = Field(default={})
    add_tokens: tuple[str, ...] = ()
    base_fingerprint: str | None = None
    split_experts: bool = False
    """Whether it is for a model whose experts were taken apart."""
    layers: tuple[str, ...] = ()
    """The adapted layers, where the names of the tensors do not tell."""
    codes: str | None = None
    """A hash of the quantised base that it was trained on."""
    codes_of: str | None = None
    """The type that W0 was rounded to before it was quantised: other types have other codes."""
    formats: dict[str, dict[str, int]] = Field(default={})
    """Layer -> settings of the format of its W0, where it has its own."""


@dataclass(frozen=True)
class Saved:
    """An adapter on disk."""

    folder: Path
    config: peft_format.Config
    ours: Ours
    tensors: dict[str, Tensor]

    @property
    def base(self) -> str | None:
        """The base's folder or Hub id; PEFT writes an empty one for a model that was made in memory."""
        return self.config.base_model_name_or_path or None

    @property
    def splits_experts(self) -> bool:
        """Whether the experts of its base have to be taken apart before it fits."""
        return self.ours.split_experts or bool(self.config.target_parameters)

    def fits_codes(self, codes: str | None) -> bool:
        """Whether it was trained on a base with these codes (None: with none); PEFT's adapters do not say."""
        return not self.ours.lora_version or codes == self.ours.codes

    def mismatch(self, what: str) -> UserError:
        """The error that the adapter does not go with a model."""
        what = f"does not fit this model: {what}"
        fix = f"it was made for {self.base}" if self.base else ""
        return UserError(what, where=str(self.folder), fix=fix, code=ExitCode.MODEL)


def read(folder: Path) -> Saved:
    """Read an adapter folder that this tool or PEFT wrote.

    Raises:
        UserError: it is not one, is damaged, or needs something that is not computed here.
    """
    config = _json(folder / CONFIG, peft_format.Config)
    ours = _json(folder / OURS, Ours) if (folder / OURS).exists() else Ours()
    _refuse_unknown(config, str(folder / CONFIG))
    return Saved(folder, config, ours, _with_experts_apart(config, _tensors(folder / WEIGHTS), folder))


def _with_experts_apart(
    config: peft_format.Config, tensors: dict[str, Tensor], folder: Path
) -> dict[str, Tensor]:
    if config.peft_type != peft_format.LORA or not config.target_parameters:
        return tensors
    try:
        return expert_format.apart(config.target_parameters, config.r, tensors, peft_format.PREFIX)
    except ValueError as error:
        raise UserError(f"uses {error}", where=str(folder / CONFIG), code=ExitCode.MODEL) from error


def _json(path: Path, kind: type[Model]) -> Model:
    try:
        content = path.read_bytes()
        _refuse_twice(content)
        return kind.model_validate_json(content)
    except FileNotFoundError as error:
        fix = f"an adapter folder holds {CONFIG} and {WEIGHTS}"
        raise UserError("there is no such file", where=str(path), fix=fix, code=ExitCode.MODEL) from error
    except OSError as error:
        raise UserError(f"cannot be read: {error}", where=str(path), code=ExitCode.MODEL) from error
    except ValidationError as error:
        first = error.errors()[0]
        key = "".join(f"{step}: " for step in first["loc"])
        what = f"is not what an adapter has there: {key}{first['msg']}"
        raise UserError(what, where=str(path), code=ExitCode.MODEL) from error
    except (ValueError, RecursionError) as error:
        what = f"is not what an adapter has there: {error}"
        raise UserError(what, where=str(path), code=ExitCode.MODEL) from error


def _refuse_twice(content: bytes) -> None:
    """Refuse JSON with a key given twice: of two readers, one may take the first and one the last."""

    def once(pairs: list[tuple[str, Any]]) -> None:
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            raise ValueError(f"the key {max(keys, key=keys.count)!r} is given twice")

    json.loads(content, object_pairs_hook=once)


def _refuse_unknown(config: peft_format.Config, where: str) -> None:
    known = (peft_format.LORA, peft_format.OURS)
    if config.peft_type not in known:
        what, fix = f"peft_type '{config.peft_type}' is not known", f"known: {', '.join(known)}"
        raise UserError(what, where=where, fix=fix, code=ExitCode.MODEL)
    if unknown := config.unknown():
        what = f"uses {', '.join(unknown)}, which is not computed here"
        raise UserError(what, where=where, code=ExitCode.MODEL)
    if config.init_lora_weights not in peft_format.HARMLESS_STARTS:
        what = f"was started with '{config.init_lora_weights}', which changes the base"
        fix = (
            "save it from PEFT with path_initial_model_for_weight_conversion; then it fits the original base"
        )
        raise UserError(what, where=where, fix=fix, code=ExitCode.MODEL)


def _tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
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
    return {key: _as_matrix(key, tensor) for key, tensor in tensors.items() if not _is_leftover(key, tensors)}


def _as_matrix(key: str, tensor: Tensor) -> Tensor:
    """The factors of a convolution as matrices, and its lengths as a vector, as everywhere else."""
    ending = key.rpartition(".lora_")[2]
    if tensor.ndim < 3:
        return tensor
    if ending in ("A.weight", "B.weight"):
        return tensor.flatten(1)
    return tensor.flatten() if ending == "magnitude_vector" else tensor


def _is_leftover(key: str, tensors: dict[str, Tensor]) -> bool:
    """PEFT with `bias: all` writes the biases of modules trained in full three times; the plain name is right."""
    plain = re.sub(r"\.(modules_to_save|original_module)\.bias$", ".bias", key)
    return plain != key and plain in tensors
