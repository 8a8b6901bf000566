"""Recipe.model -> the model and its tokenizer. Everything about transformers' models that others need to know."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging
from transformers.utils.hub import cached_file

from lora_cli import experts, packed, parts
from lora_cli.adapter.layer import Adapted
from lora_cli.adapter.plan import Ends
from lora_cli.adapter.quantised import Quantised, Readable
from lora_cli.errors import ExitCode, UserError
from lora_cli.recipe.schema import ModelRecipe
from lora_cli.tensors import headers

READ = (
    "*.safetensors", "*.bin", "*.model", "*.jinja", "config.json", "token*", "vocab*", "merges*", "*tokens*.json"
)  # fmt: skip
"""Files in a model's folder that decide what it and its tokenizer are."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LanguageModel:
    """A plain model, ready to be adapted."""

    model: PreTrainedModel
    tokenizer: Any
    ends: Ends
    new_rows: tuple[int, ...]
    """Ids of the tokens that the recipe added."""

    @property
    def pad_id(self) -> int:
        """What fills up padded rows; never learned from, so any id will do that the embedding has a row for.

        A pad token that was added to the tokenizer alone has none.
        """
        rows = end_modules(self.model)[0].weight.shape[0]
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None and token < rows:
                return token
        return 0


def load(recipe: ModelRecipe, device: torch.device | None = None) -> LanguageModel:
    """Load weights and tokenizer, add tokens, untie the ends; on `device` (default: the CPU).

    What is to be quantised stays on the CPU until it is.

    Raises:
        UserError: the model is missing, is not a decoder-only language model, or its files are incomplete.
    """
    device = device or torch.device("cpu")
    tokenizer = load_tokenizer(recipe)
    model = _weights(recipe, stored_dtype(recipe, device))
    if (
        recipe.quantize is None
    ):  # else it is quantised here first, layer by layer, and may not fit there before
        model = model.to(device)  # pyright: ignore[reportArgumentType]
    return with_tokens(model, tokenizer, recipe)


def skeleton(recipe: ModelRecipe, device: str = "meta", **settings: Any) -> PreTrainedModel:
    """The model without its weights, on the meta device: all that a plan needs.

    Args:
        recipe: which model.
        device: inside PyTorch's FakeTensorMode any device.
        settings: of transformers' `from_config`, such as `dtype`.
    """
    config = _config(recipe)
    skeleton, form = _without_weights(recipe, config, device, **settings), packed.form_of(config)
    if form is not None:
        packed.pretend(skeleton, form)
    return skeleton


def is_packed(recipe: ModelRecipe) -> bool:
    """Whether its files hold codes, not weights.

    Raises:
        UserError: there is no such model, or it is none that can be adapted.
    """
    return packed.form_of(_config(recipe)) is not None


def plain_skeleton(recipe: ModelRecipe) -> PreTrainedModel:
    """The same, with plain layers where the files hold codes: what such a model is when they are multiplied out."""
    return _without_weights(recipe, _config(recipe))


def _without_weights(
    recipe: ModelRecipe, config: Any, device: str = "meta", **settings: Any
) -> PreTrainedModel:
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **settings)
    except Exception as error:  # foreign files: every library that reads them fails in its own way
        raise missing(recipe, f"config.json describes no model: {_first_line(error)}") from error
    for module in model.modules():
        # Gemma's embeddings keep their factor as a number too; in the tensor on the meta device it is lost.
        if hasattr(module, "scalar_embed_scale"):
            module.embed_scale = torch.tensor(module.scalar_embed_scale)
    return model.eval()


def with_tokens(model: PreTrainedModel, tokenizer: Any, recipe: ModelRecipe) -> LanguageModel:
    """Untie the ends, take experts apart and add tokens, as the recipe says."""
    if recipe.untie:
        _untie(model)
    if recipe.split_experts and not experts.split(model):
        what, fix = "this model has no experts whose weights are one tensor", "leave it out"
        raise UserError(what, where="model.split_experts", fix=fix, code=ExitCode.MODEL)
    new_rows = _grow(model, tokenizer, recipe.add_tokens)
    return LanguageModel(model, tokenizer, ends_of(model), new_rows)


def fingerprint(recipe: ModelRecipe) -> dict[str, str]:
    """File -> hash of all that model and tokenizer are read from; of a model on the Hub its commit."""
    config, folder = _config(recipe), Path(recipe.name)
    if not folder.is_dir():
        return {recipe.name: str(config._commit_hash)}
    files = {path for pattern in READ for path in folder.glob(pattern) if path.is_file()}
    return {path.name: _sampled(path) for path in sorted(files)}


def _sampled(path: Path) -> str:
    """Hash of a file's size and 64 blocks spread over it: other weights differ everywhere, and reading all is slow."""
    size, block = path.stat().st_size, 1 << 16
    starts = range(0, size, block) if size <= 64 * block else [(size - block) * i // 63 for i in range(64)]
    found = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            found.update(file.read(block))
    return found.hexdigest()


def load_tokenizer(recipe: ModelRecipe) -> Any:
    """The model's tokenizer; its own code only, never remote code."""
    _config(recipe)
    try:
        return AutoTokenizer.from_pretrained(recipe.name, revision=recipe.revision, trust_remote_code=False)
    except Exception as error:  # as above
        raise missing(recipe, f"no usable tokenizer: {_first_line(error)}") from error


def end_modules(model: PreTrainedModel) -> tuple[Any, Any]:
    """The embeddings and the output head."""
    return model.get_input_embeddings(), model.get_output_embeddings()


def ends_of(model: PreTrainedModel) -> Ends:
    """Names of the embeddings and the output head."""
    names = {id(module): name for name, module in model.named_modules()}
    embeddings, head = end_modules(model)
    tied = embeddings.weight is head.weight
    return Ends(names[id(embeddings)], names[id(head)], tied)


def stored_dtype(recipe: ModelRecipe, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on GPUs that have it, and where a CPU has it and the files lose nothing; else float32."""
    if recipe.dtype != "auto":
        return DTYPES[recipe.dtype]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    else:
        fast = multiplies_bfloat16(device) and dtype_on_disk(recipe) == "bfloat16"
    return torch.bfloat16 if fast else torch.float32


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether this is a CPU that multiplies bfloat16 in hardware; PyTorch before 2.13 cannot say."""
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def dtype_on_disk(recipe: ModelRecipe) -> str:
    """How the model's files store it; float32, which holds every other type, where the config does not say."""
    dtype = str(getattr(_config(recipe), "dtype", None)).removeprefix("torch.")
    return dtype if dtype in DTYPES else "float32"


def stored_as(model: nn.Module) -> torch.dtype:
    """How most of a model is stored: the smallest of its types; what trains in full is float32 whatever the rest is."""
    kinds = {p.dtype for p in _plain(model) if p.is_floating_point()}
    return min(kinds, key=lambda kind: kind.itemsize)


def size_of(model: nn.Module) -> int:
    """Numbers in the model itself, without those of adapters."""
    quantised = [layer for layer in model.modules() if isinstance(layer, Quantised)]
    return sum(p.numel() for p in {id(p): p for p in _plain(model)}.values()) + sum(
        layer.in_features * layer.out_features for layer in quantised
    )


def bytes_of(model: nn.Module) -> int:
    """What parameters and buffers of the model itself take, without those of adapters."""
    codes = (t for layer in model.modules() if isinstance(layer, Quantised) for t in layer.kept().values())
    tensors = [*_plain(model), *model.buffers(), *codes]
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def computing(model: nn.Module, precision: torch.dtype | None = None) -> AbstractContextManager[Any]:
    """Context in which a model computes in `precision`; default: in what it is stored in.

    Nothing to do where every weight has that type: the deltas of adapters cast themselves.
    """
    precision = precision or stored_as(model)
    if precision is torch.float32 or {p.dtype for p in _plain(model)} == {precision}:
        return nullcontext()
    return torch.autocast(next(model.parameters()).device.type, dtype=precision)


def _plain(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of the model itself, without what adapters put beside them."""
    if isinstance(module, Adapted):
        yield from _plain(module.base_layer)
        return
    codes = module.kept() if isinstance(module, Quantised) else {}
    yield from (p for name, p in module.named_parameters(recurse=False) if name not in codes)
    for child in module.children():
        yield from _plain(child)


def max_positions(model: PreTrainedModel) -> int | None:
    """The longest sequence the model has positions for, when it says so."""
    return getattr(model.config, "max_position_embeddings", None)


def quiet() -> None:
    """Leave the terminal to this tool: transformers' own bars and warnings off."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()


def _config(recipe: ModelRecipe) -> Any:
    """Read the configuration and refuse what is not a decoder-only language model, by name and with the reason."""
    quiet()
    _check_folder(recipe.name)
    try:
        config = AutoConfig.from_pretrained(recipe.name, revision=recipe.revision, trust_remote_code=False)
    except Exception as error:  # as above
        raise missing(recipe, _first_line(error)) from error
    reason = _not_a_language_model(config)
    if reason:
        raise UserError(f"{recipe.name} is {reason}", where="model.name", fix=SCOPE, code=ExitCode.MODEL)
    form = packed.form_of(config)
    if form is not None and recipe.quantize not in (None, "none"):
        what = f"{recipe.name} is stored in {form.part} already"
        raise UserError(what, where="model.quantize", fix="leave it out, or set none", code=ExitCode.MODEL)
    if form is not None:
        packed.require(recipe.name, form)
    return config


def _check_folder(name: str) -> None:
    """A path beside existing folders is meant as one: do not ask the Hub for `models/misspelt`.

    Raises:
        UserError: there is no such folder.
    """
    path = Path(name)
    local = (
        path.is_absolute() or name.startswith((".", "~")) or (len(path.parts) > 1 and path.parent.is_dir())
    )
    if not local or path.is_dir():
        return
    beside = sorted(each.name for each in path.parent.glob("*") if each.is_dir())
    near = parts.nearest(path.name, beside) or beside[:8]
    fix = f"in {path.parent} there are: {', '.join(near)}" if near else "scripts/quickstart makes models/"
    raise UserError(f"there is no folder {name}", where="model.name", fix=fix, code=ExitCode.MODEL)


SCOPE = "lora adapts decoder-only language models of transformers, such as Llama, Qwen, Gemma, Mistral, GPT-2"


def _not_a_language_model(config: Any) -> str | None:
    kind = f"a '{config.model_type}' model"
    if config.is_encoder_decoder:
        return f"{kind}, an encoder-decoder"
    if any(getattr(config, key, None) is not None for key in ("vision_config", "audio_config")):
        return f"{kind}, which reads more than text"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return f"{kind}, which does not predict the next token"
    stored = packed.method_of(config)
    if stored is not None and packed.form_of(config) is None:
        known = ", ".join(packed.readable())
        return f"{kind}, stored quantised ({stored}); what is read is described by `lora methods`: {known}"
    code = (getattr(config, f"_{part}_implementation", None) for part in ("attn", "experts"))
    if any("/" in str(name) for name in code):
        return f"{kind}, which computes with code from the Hub"
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", True):
        return f"{kind}, an encoder"
    return None


def _refuse_pickles(recipe: ModelRecipe) -> None:
    """Refuse a model whose own files lead to others than the safetensors beside them.

    `use_safetensors` settles the first file alone: an index in it may name pickles, and files of other folders.

    Raises:
        UserError: naming the file.
    """
    if _file(recipe, "adapter_config.json") is not None:
        raise missing(recipe, "it is an adapter, which has a base of its own")
    named = [getattr(_config(recipe), "transformers_weights", None) or SAFE_WEIGHTS_NAME]
    index = _file(recipe, SAFE_WEIGHTS_INDEX_NAME)
    if index is not None:
        named += _shards(recipe, index)
    for name in named:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise missing(recipe, f"its weights are said to be in {name}, and only safetensors are opened")


def _shards(recipe: ModelRecipe, index: Path) -> list[str]:
    try:
        return [str(name) for name in json.loads(index.read_bytes())["weight_map"].values()]
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise missing(recipe, f"{index.name} is damaged") from error


def weight_files(recipe: ModelRecipe) -> list[Path]:
    """The safetensors that hold the weights; a single file goes before an index, as in transformers.

    Raises:
        UserError: there are none, one is missing, or they lead to pickles or to other folders.
    """
    _refuse_pickles(recipe)
    names = [getattr(_config(recipe), "transformers_weights", None) or SAFE_WEIGHTS_NAME]
    index = _file(recipe, SAFE_WEIGHTS_INDEX_NAME)
    if index is not None and _file(recipe, names[0]) is None:
        names = sorted(set(_shards(recipe, index)))
    found = {name: _file(recipe, name) for name in names}
    absent = [name for name, path in found.items() if path is None]
    if absent:
        raise missing(recipe, f"there is no {absent[0]}")
    return [path for path in found.values() if path is not None]


def _file(recipe: ModelRecipe, name: str) -> Path | None:
    """A file of the model, in its folder or from the Hub; None where it has none."""
    with suppress(OSError):
        found = cached_file(recipe.name, name, revision=recipe.revision)
        return None if found is None else Path(found)
    return None


def _weights(recipe: ModelRecipe, dtype: torch.dtype) -> PreTrainedModel:
    _refuse_pickles(recipe)
    form = packed.form_of(_config(recipe))
    if form is not None:
        return _packed(recipe, dtype, form).eval()
    model = _loaded(recipe, dtype)
    try:
        packed.refuse_unsaid({name: entry.dtype for name, entry in headers(weight_files(recipe))[0].items()})
    except ValueError as error:
        raise missing(recipe, str(error)) from error
    return model.eval()


def _loaded(recipe: ModelRecipe, dtype: torch.dtype, **more: Any) -> PreTrainedModel:
    """By transformers, whose settings `more` are."""
    attention = {} if recipe.attention == "auto" else {"attn_implementation": recipe.attention}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            recipe.name,
            revision=recipe.revision,
            dtype=dtype,
            use_safetensors=True,  # never a pickle
            trust_remote_code=False,
            output_loading_info=True,
            **attention,
            **more,
        )
    except Exception as error:  # as above
        raise missing(recipe, _first_line(error)) from error
    model, info = loaded
    if info["missing_keys"]:
        first = sorted(info["missing_keys"])[0]
        raise missing(recipe, f"{len(info['missing_keys'])} weights are missing, such as {first}")
    return model


def _packed(recipe: ModelRecipe, dtype: torch.dtype, form: packed.Form) -> PreTrainedModel:
    """A model with layers in codes; besides these one layer at a time is in memory."""
    config = _config(recipe)
    plain = _without_weights(recipe, config)
    try:
        entries, files = headers(weight_files(recipe))
        layers = packed.layers(form, plain, {name: entry.dtype for name, entry in entries.items()})
    except (SafetensorError, OSError, ValueError) as error:
        raise missing(recipe, _first_line(error)) from error
    vacant: Any = packed.Vacancies(tuple(layers))
    model = _loaded(recipe, dtype, config=packed.unpacked(config), quantization_config=vacant)

    def read(name: str, stored: Sequence[str]) -> Readable:
        try:
            layer = packed.read(
                form, plain.get_submodule(name), stored, lambda each: files[each].get_tensor(each)
            )
        except (SafetensorError, OSError, ValueError) as error:
            raise missing(recipe, f"{stored[0]}: {_first_line(error)}") from error
        layer.dtype = dtype
        return layer

    packed.occupy(model, ((name, read(name, stored)) for name, stored in layers.items()))
    return model


def missing(recipe: ModelRecipe, reason: str) -> UserError:
    """The error that a model's files are not what they have to be."""
    fix = "give a folder with config.json and *.safetensors, or an id on the Hub"
    return UserError(f"cannot load {recipe.name}: {reason}", where="model.name", fix=fix, code=ExitCode.MODEL)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _untie(model: PreTrainedModel) -> None:
    """Give the head a copy of the embeddings and note it in the config, which is saved with the model.

    Raises:
        UserError: it has one of its own.
    """
    embeddings, head = end_modules(model)
    if embeddings.weight is not head.weight:
        what = "the output head of this model has a weight of its own already"
        raise UserError(what, where="model.untie", fix="leave it out", code=ExitCode.MODEL)
    head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False


def _grow(model: PreTrainedModel, tokenizer: Any, tokens: tuple[str, ...]) -> tuple[int, ...]:
    """Add tokens; new rows start as the mean of the old ones. Returns their ids."""
    if not tokens:
        return ()
    known = [token for token in tokens if token in tokenizer.get_vocab()]
    if known:
        raise UserError(f"'{known[0]}' is in the vocabulary already", where="model.add_tokens")
    if any(isinstance(end, Quantised) for end in end_modules(model)):
        what = "the output head is stored in codes, which have no room for new rows"
        raise UserError(what, where="model.add_tokens", fix="leave it out", code=ExitCode.MODEL)
    tokenizer.add_tokens(list(tokens))
    ids = tuple(tokenizer.convert_tokens_to_ids(list(tokens)))
    old = end_modules(model)[0].weight.shape[0]
    if ids and max(ids) >= old:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    with torch.no_grad():
        for weight in {id(end.weight): end.weight for end in end_modules(model)}.values():
            if ids:
                start_rows(weight, old, ids)
    return ids


def start_rows(weight: torch.Tensor, old: int, ids: tuple[int, ...]) -> None:
    """Let the rows of new tokens, and all behind the `old` ones, be the mean of the old ones."""
    rows = sorted({*ids, *range(old, weight.shape[0])})
    weight[rows] = weight[:old].float().mean(0).to(weight.dtype)
