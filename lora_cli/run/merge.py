"""`lora merge`: a plain model with the adapter in its weights, proven to compute the same. Read `merge` first.

The base is read, merged and written layer by layer: memory grows with the largest layer, never with the model. The
proof is made in the same way, so that it is the same one for a model that fits nowhere:

- every merged layer computes what its base and adapter compute side by side, before it is rounded;
- every tensor that was written is read back, and is to the bit what was computed, or what the base has;
- what was written is a whole model with the ends that it should have, and its tokenizer does the same.
"""

from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError
from transformers import GenerationConfig

from lora_cli import io_ops
from lora_cli import model as models
from lora_cli.adapter import files
from lora_cli.adapter.saved import Saved
from lora_cli.data import template
from lora_cli.data.tokens import encode
from lora_cli.errors import ExitCode, UserError
from lora_cli.model import DTYPES
from lora_cli.recipe.schema import ModelRecipe, Recipe
from lora_cli.run import onto as ontos
from lora_cli.run import probe, rewrite
from lora_cli.run.open import adapter_in, base_of, named_by, refuse_inside, refuse_routed, trained_with
from lora_cli.run.rewrite import Rewriting, digest
from lora_cli.run.weights import Onto, Weights, open_weights
from lora_cli.screen import Screen
from lora_cli.stored import Entry, open_stored

TOLERANCE = 1e-5
"""Largest ‖merged − live‖ / ‖live‖ of what a layer computes, both in float32."""
SHARE_TO_WARN = 0.5
WORST = 5
"""Layers that are shown."""


def merge(
    path: Path,
    output: Path,
    dtype: str | None,
    screen: Screen,
    base: str | None = None,
    onto: Onto = "trained",
) -> dict[str, Any]:
    """Merge the adapter in `path` into its base and write the model to `output`; return what it cost.

    Args:
        path: adapter folder or run folder.
        output: folder to make.
        dtype: type of the merged weights; default: each keeps that of the base's files.
        screen: where the losses are shown.
        base: use this model instead of the one the adapter names.
        onto: which weights, where the adapter was trained on quantised ones.

    Raises:
        UserError: there is nothing to merge, it cannot be merged, or the result does not compute what it should;
            then nothing is left in `output`.
    """
    folder = adapter_in(path)
    refuse_routed(folder)
    saved, trained = files.read(folder), trained_with(folder)
    recipe = _source(saved, trained, base)
    refuse_inside(output, folder, Path(recipe.name))
    io_ops.remove_abandoned(output)
    with io_ops.new_folder(output) as made:
        with named_by("--base" if base else str(folder / files.CONFIG)):
            weights = open_weights(recipe)
        plan = files.plan_of(saved, weights.language.model, weights.language.ends, weights)
        weights, plan = ontos.merged_onto(weights, plan, saved, onto, screen)
        work = rewrite.prepare(weights, saved, plan, None if dtype is None else DTYPES[dtype], onto)
        _use_template(weights, trained, screen)
        written = rewrite.write(work, made)
        ontos.check_codes(work, screen)
        _check_layers(work)
        _save_the_rest(work, made, _type_of(written))
        _read_back(work, written, made)
    report = {"output": str(output), **_report(work, _type_of(written)), **ontos.report(work)}
    _show(report, screen)
    return report


def _source(saved: Saved, trained: Recipe | None, base: str | None) -> ModelRecipe:
    """The base, with the tokens that were added to it."""
    if base is None and saved.base is None:
        what, fix = "the adapter does not name its base", "give it with --base"
        raise UserError(what, where=str(saved.folder), fix=fix, code=ExitCode.MODEL)
    return base_of({"": saved}, trained, base, None)


def _use_template(weights: Weights, trained: Recipe | None, screen: Screen) -> None:
    """The merged model speaks in the template that the adapter learned."""
    if trained is None:
        return
    try:
        template.use(weights.language.tokenizer, trained.data.chat_template)
    except UserError as error:
        screen.warn(f"{error.what}; the merged model has its base's")


def _type_of(written: dict[str, Entry]) -> str:
    """The type that most of a model is written in."""
    sizes: dict[str, int] = {}
    for entry in written.values():
        name = str(entry.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + entry.size
    return max(sizes, key=lambda name: sizes[name])


def _save_the_rest(work: Rewriting, made: Path, dtype: str) -> None:
    """Config, generation settings and tokenizer."""
    language, recipe = work.weights.language, work.weights.stored.recipe
    model, config = language.model, language.model.config
    config.dtype, config.architectures = dtype, [type(model).__name__]
    if not work.tied:
        config.tie_word_embeddings = False
    try:
        with TemporaryDirectory() as elsewhere:  # what other libraries write goes through io_ops in the end
            config.save_pretrained(elsewhere)
            if model.can_generate():
                _generation(recipe, model.generation_config).save_pretrained(elsewhere)
            language.tokenizer.save_pretrained(elsewhere)
            for file in sorted(path for path in Path(elsewhere).rglob("*") if path.is_file()):
                io_ops.write_bytes(made / file.relative_to(elsewhere), file.read_bytes())
    except (OSError, SafetensorError) as error:
        fix = "see that the disk has room for the model"
        raise UserError(f"cannot write ({error})", where=str(made), fix=fix, code=ExitCode.DISK) from error
    except ValueError as error:  # transformers' own check of the settings that come with the base
        fix = "mend generation_config.json in the folder of the base"
        raise UserError(f"cannot save: {error}", where="the base", fix=fix, code=ExitCode.MODEL) from error


def _generation(recipe: ModelRecipe, default: Any) -> Any:
    """What comes with the base; most models have a file, for the others the config says it."""
    try:
        return GenerationConfig.from_pretrained(recipe.name, revision=recipe.revision or "main")
    except OSError:
        return default


# ---- proof --------------------------------------------------------------------------------------------------------


def _check_layers(work: Rewriting) -> None:
    """Every layer of the plan is merged, and computes what it did before.

    Raises:
        UserError: one does not.
    """
    missing = sorted({spec.name for spec in work.plan.layers} - work.lost.keys())
    if missing:
        raise _wrong(f"{len(missing)} layers are not in it, such as {missing[0]}", "")
    for name, error in work.errors.items():
        if not error <= TOLERANCE:
            what = f"{name} is {error:.1e} away from what base and adapter compute, more than {TOLERANCE:.0e}"
            raise _wrong(what, "")


def _read_back(work: Rewriting, written: dict[str, Entry], made: Path) -> None:
    """Hold what is on the disk against what was computed.

    Raises:
        UserError: it is not the same.
    """
    again, tokenizer = ModelRecipe.model_validate({"name": str(made)}), work.weights.language.tokenizer
    found = open_stored(again)
    if (
        found.entries != written
        or models.ends_of(found.skeleton).tied != work.tied
        or any(digest(entry, found.blocks(name)) != work.digests[name] for name, entry in written.items())
        or not _same(models.load_tokenizer(again), tokenizer)
    ):
        raise _wrong("what was read back is not what was merged", "run the same command again")


def _same(found: Any, expected: Any) -> bool:
    """Whether two tokenizers do the same."""
    return (
        found.get_vocab() == expected.get_vocab()
        and found.chat_template == expected.chat_template
        and encode(found, *probe.TEXTS) == encode(expected, *probe.TEXTS)
    )


def _wrong(what: str, fix: str) -> UserError:
    return UserError(what, where="the merged model", fix=fix, code=ExitCode.VERIFICATION)


# ---- report -------------------------------------------------------------------------------------------------------


def _report(work: Rewriting, dtype: str) -> dict[str, Any]:
    lost = dict(work.lost)
    return {
        "dtype": dtype,
        "layer_error": max(work.errors.values(), default=0.0),
        "tolerance": TOLERANCE,
        "median_layer_loss": median(lost.values()),
        "layer_losses": lost,
    }


def _show(report: dict[str, Any], screen: Screen) -> None:
    losses, share = report["layer_losses"], report["median_layer_loss"]
    ontos.show(report, screen)
    if max(losses.values()) > 0:
        worst = sorted(losses.items(), key=lambda item: -item[1])[:WORST]
        screen.table(["layer", f"error of rounding to {report['dtype']}, as a share of ΔW"], worst)
        screen.note(f"median of {len(losses)} layers: {share:.2g}")
    screen.note(
        f"merged into {report['output']} ({report['dtype']}); read back, every tensor is what was computed, and each "
        f"merged layer computes what base and adapter do, to {report['layer_error']:.1e} "
        f"(at most {report['tolerance']:.0e} is let through)"
    )
    if share > SHARE_TO_WARN:
        screen.warn(
            f"rounding to {report['dtype']} moves the weights by {share:.0%} of what the adapter moves them; "
            "--dtype float32 keeps all of it"
        )
