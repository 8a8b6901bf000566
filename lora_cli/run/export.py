"""`lora export`: an adapter in a format that other tools read, proven to compute the same."""

from pathlib import Path
from typing import Any

from torch import Tensor

from lora_cli import io_ops, parts
from lora_cli.adapter import files
from lora_cli.adapter.inject import Adapter, inject
from lora_cli.adapter.portable import Portable, as_lora, cut
from lora_cli.adapter.saved import Saved
from lora_cli.errors import ExitCode, UserError
from lora_cli.model import LanguageModel
from lora_cli.run import probe
from lora_cli.run.open import RECIPE, TEMPLATE, adapter_in, open_model, refuse_inside, refuse_routed
from lora_cli.screen import Screen

TOLERANCE = 1e-5
"""Largest ‖exported − live‖ / ‖live‖ of logits, computed in float32."""


def export(
    path: Path, format: str, output: Path, screen: Screen, base: str | None = None, r: int | None = None
) -> dict[str, Any]:
    """Write the adapter in `path` to the folder `output` in PEFT's format, read it back, and compare.

    Args:
        path: adapter folder or run folder.
        format: `peft`.
        output: folder to make.
        screen: where the result is shown.
        base: use this model instead of the one the adapter names.
        r: leave the first so many components of every layer; of an adapter that dylora trained.

    Raises:
        UserError: there is no adapter, PEFT has nothing that computes the same, or what was written does not.
    """
    if format != "peft":
        fix = parts.did_you_mean(format, ["peft"])
        raise UserError(f"unknown format '{format}'", where="--format", fix=fix)
    folder = adapter_in(path)
    refuse_routed(folder)
    refuse_inside(output, folder)
    with io_ops.new_folder(output) as made:
        opened = open_model([folder], base=base)
        (adapter,), (saved,) = opened.adapters.values(), opened.saved.values()
        if r is not None:
            _check_cut(saved, r)
            cut(adapter, r)
        rows = probe.rows_for(opened.language, opened.recipe)
        live = probe.logits(opened.language.model, rows)
        adapter.deactivate()
        exact = _as_lora(adapter)
        named = base or str(saved.base)
        files.write(
            made, exact, adapter.model, named, saved.config.revision, saved.ours.add_tokens, adapter.codes
        )
        _carry_along(folder, made, opened.language)
        error = probe.distance(_reload(made, opened.language, rows), live)
        if not error <= TOLERANCE:
            what = f"its logits are {error:.1e} away from the adapter's, more than {TOLERANCE:.0e}"
            raise UserError(what, where="the exported adapter", code=ExitCode.VERIFICATION)
    screen.note(f"exported to {output}; read back, its logits differ by {error:.1e}")
    return {"output": str(output), "format": format, "layers": len(exact.plan.layers), "logit_error": error}


def _check_cut(saved: Saved, r: int) -> None:
    """Refuse to cut what is in no order, or where nothing would be cut.

    Raises:
        UserError: dylora did not train it, or its rank is not larger.
    """
    trained = [part.name for part in saved.ours.parts.get("rank", ())]
    if trained != ["dylora"]:
        what = "only of an adapter that dylora has trained the first components are one of their own"
        raise UserError(what, where="--r", fix="leave it out, or train with adapter.method: dylora")
    largest = max([saved.config.r, *(saved.config.rank_pattern or {}).values()])
    if r > largest:
        raise UserError(f"its rank is {largest}", where=f"--r {r}", fix="give a smaller one")


def _as_lora(adapter: Adapter) -> Portable:
    """LoRA that adds exactly the same.

    Raises:
        UserError: a layer's ΔW is not a product of two thin matrices, or there is none.
    """
    exact = as_lora(adapter)
    if exact is not None and exact.plan.taken:
        name = next(name for name, layer in adapter.layers.items() if layer.base.taken is not None)
        what = "its base was quantised without what A and B started with, and PEFT would quantise all of it"
        raise UserError(what, where=name, fix="merge it instead: lora merge", code=ExitCode.MODEL)
    if exact is None or not exact.plan.layers:
        what = f"{adapter.plan.method.name} is no low-rank matrix added to the weight, and PEFT's LoRA is nothing else"
        where = next((name for name, delta in adapter.deltas.items() if delta.factors() is None), "adapter")
        raise UserError(what, where=where, fix="merge it instead: lora merge", code=ExitCode.MODEL)
    return exact


def _carry_along(folder: Path, made: Path, language: LanguageModel) -> None:
    """Card, recipe and chat template, and the tokenizer where it has tokens of its own."""
    for name in ("README.md", RECIPE, TEMPLATE):
        if (folder / name).is_file():
            io_ops.write_bytes(made / name, (folder / name).read_bytes())
    if language.new_rows:
        language.tokenizer.save_pretrained(made)


def _reload(made: Path, language: LanguageModel, rows: list[Tensor]) -> Tensor:
    """Logits with the adapter on disk; no other one is active."""
    saved = files.read(made)
    again = inject(language.model, files.plan_of(saved, language.model, language.ends))
    files.fill(again, saved)
    return probe.logits(language.model, rows)
