"""`lora merge`: a plain model with the adapter in its weights, proven to compute the same. Read `merge` first."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lora_cli import io_ops
from lora_cli import model as models
from lora_cli.adapter import files, inject
from lora_cli.adapter.inject import without_adapters
from lora_cli.data import template
from lora_cli.data.tokens import encode
from lora_cli.errors import ExitCode, UserError
from lora_cli.model import DTYPES, LanguageModel
from lora_cli.recipe.schema import ModelRecipe
from lora_cli.run import probe
from lora_cli.run.open import Opened, adapter_in, open_model, refuse_inside, refuse_routed
from lora_cli.screen import Screen

TOLERANCES = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 3e-2}
"""Largest ‖merged − live‖ / ‖live‖ of logits, both computed in float32: what rounding the weights may do to them.

float16 rounds every weight by up to 2^-11 of itself, bfloat16 by 2^-8; measured on a model of 30 blocks, that moves
the logits by 0.1 % and up to 1 %. A mistake moves them by what the adapter learned, or by everything.
"""
SHARE_TO_WARN = 0.1
WORST = 5
"""Layers that are shown."""
SHARD = "4GB"


@dataclass(frozen=True)
class Expected:
    """What is remembered of the model that was written, to hold the one that is read back against it."""

    rows: list[Tensor]
    base: Tensor
    """Logits of the base on the rows, float32 [positions, vocabulary]."""
    live: Tensor
    """Logits of base and adapter side by side."""
    digests: dict[str, str]
    """Of every merged tensor."""
    tokenizer: Any


def merge(
    path: Path, output: Path, dtype: str | None, screen: Screen, base: str | None = None
) -> dict[str, Any]:
    """Merge the adapter in `path` into its base and write the model to `output`; return what it cost.

    One model at a time is in memory: the merged one is dropped before it is read back.

    Args:
        path: adapter folder or run folder.
        output: folder to make.
        dtype: type of the merged weights; default: that of the base's files.
        screen: where the losses are shown.
        base: use this model instead of the one the adapter names.

    Raises:
        UserError: there is nothing to merge, it cannot be merged, or the result does not compute what it should;
            then nothing is left in `output`.
    """
    folder = adapter_in(path)
    refuse_routed(folder)
    source = _source(folder, base)
    refuse_inside(output, folder, Path(source.name))
    # Some models round constants of theirs to the type they are loaded in, so float32 starts from float32.
    loaded_as = dtype if dtype == "float32" else source.dtype
    with io_ops.new_folder(output) as made:
        # No variable holds what is opened: it is gone before `_verify` reads the new model.
        expected, lost = _write(open_model([folder], base=base, dtype=loaded_as), made, dtype, screen)
        report = {"output": str(output), **_verify(made, expected)}
    report |= {"median_layer_loss": median(lost.values()), "layer_losses": lost}
    _show(report, screen)
    return report


def _source(folder: Path, base: str | None) -> ModelRecipe:
    """The base as it is on disk."""
    saved = files.read(folder)
    name = base or saved.base
    if name is None:
        fix = "give it with --base"
        raise UserError("the adapter does not name its base", where=str(folder), fix=fix, code=ExitCode.MODEL)
    revision = None if base else saved.config.revision
    recipe = ModelRecipe.model_validate({"name": name, "revision": revision})
    return recipe.model_copy(update={"dtype": models.dtype_on_disk(recipe)})


def _write(
    opened: Opened, made: Path, dtype: str | None, screen: Screen
) -> tuple[Expected, dict[str, float]]:
    """Merge and save; nothing of the model lives on but what it computed."""
    (adapter,) = opened.adapters.values()
    language, model = opened.language, opened.language.model
    inject.refuse_unmergeable(adapter)
    _use_template(opened, screen)
    rows = probe.rows_for(language, opened.recipe)
    live = probe.logits(model, rows)
    with without_adapters(adapter):
        plain = probe.logits(model, rows)
    lost = inject.merge(model, adapter, None if dtype is None else DTYPES[dtype])
    _cast(language, dtype)
    expected = Expected(rows, plain, live, _digests(model), language.tokenizer)
    _save(language, made)
    return expected, lost


def _use_template(opened: Opened, screen: Screen) -> None:
    """The merged model speaks in the template that the adapter learned."""
    if opened.recipe is None:
        return
    try:
        template.use(opened.language.tokenizer, opened.recipe.data.chat_template)
    except UserError as error:
        screen.warn(f"{error.what}; the merged model has its base's")


def _cast(language: LanguageModel, dtype: str | None) -> None:
    """Give the rest of the model the type too, and let the config say whether the ends are still one tensor."""
    model = language.model
    if dtype is not None:
        for name, parameter in model.named_parameters():
            parameter.data = inject.rounded(parameter.data, DTYPES[dtype], name)
    embeddings, head = models.end_modules(model)
    if embeddings.weight is not head.weight:
        model.config.tie_word_embeddings = False


def _save(language: LanguageModel, made: Path) -> None:
    try:
        language.model.save_pretrained(made, max_shard_size=SHARD)
        language.tokenizer.save_pretrained(made)
    except (OSError, SafetensorError) as error:
        fix = "see that the disk has room for the model"
        raise UserError(f"cannot write ({error})", where=str(made), fix=fix, code=ExitCode.DISK) from error
    except ValueError as error:  # transformers' own check of the settings that come with the base
        fix = "mend generation_config.json in the folder of the base"
        raise UserError(f"cannot save: {error}", where="the base", fix=fix, code=ExitCode.MODEL) from error


def _digests(model: nn.Module) -> dict[str, str]:
    """A hash of type, shape and content of every tensor that is saved."""
    digests: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digests[name] = f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(content).hexdigest()}"
    return digests


def _verify(made: Path, expected: Expected) -> dict[str, Any]:
    """Read the model back and compare.

    Raises:
        UserError: it is not what was merged, or rounding took it too far from base and adapter.
    """
    recipe = ModelRecipe.model_validate({"name": str(made)})
    recipe = recipe.model_copy(update={"dtype": models.dtype_on_disk(recipe)})
    language = models.load(recipe)
    if _digests(language.model) != expected.digests or not _same(language.tokenizer, expected.tokenizer):
        raise _wrong("what was read back is not what was merged", "run the same command again")
    again = probe.logits(language.model, expected.rows)
    error, tolerance = probe.distance(again, expected.live), TOLERANCES[recipe.dtype]
    if not error <= tolerance:
        what = f"its logits are {error:.1e} away from those of base and adapter, more than {tolerance:.0e}"
        raise _wrong(what, "merge with --dtype float32" if recipe.dtype != "float32" else "")
    change = torch.linalg.norm(expected.live - expected.base).item()
    lost = torch.linalg.norm(again - expected.live).item() / change if change else None
    return {"dtype": recipe.dtype, "logit_error": error, "tolerance": tolerance, "effect_lost": lost}


def _same(found: Any, expected: Any) -> bool:
    """Whether two tokenizers do the same."""
    return (
        found.get_vocab() == expected.get_vocab()
        and found.chat_template == expected.chat_template
        and encode(found, *probe.TEXTS) == encode(expected, *probe.TEXTS)
    )


def _wrong(what: str, fix: str) -> UserError:
    return UserError(what, where="the merged model", fix=fix, code=ExitCode.VERIFICATION)


def _show(report: dict[str, Any], screen: Screen) -> None:
    losses, share = report["layer_losses"], report["effect_lost"]
    if max(losses.values()) > 0:
        worst = sorted(losses.items(), key=lambda item: -item[1])[:WORST]
        screen.table(["layer", f"error of rounding to {report['dtype']}, as a share of ΔW"], worst)
        screen.note(f"median of {len(losses)} layers: {report['median_layer_loss']:.2g}")
    screen.note(
        f"merged into {report['output']} ({report['dtype']}); read back, its logits differ from those of base and "
        f"adapter by {report['logit_error']:.1e} (at most {report['tolerance']:.0e} is let through)"
    )
    if share is None:
        screen.warn("the adapter changes nothing on the rows that were compared")
    elif share > SHARE_TO_WARN:
        screen.warn(
            f"rounding to {report['dtype']} changes the logits by {share:.0%} of what the adapter changes them; "
            "--dtype float32 keeps all of it"
        )
