"""What a finished run leaves: the adapter folder with its card, the picture of the loss, sample answers."""

import math
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from lora_cli import io_ops
from lora_cli.adapter import files
from lora_cli.adapter.inject import without_adapters
from lora_cli.adapter.peft_format import is_peft
from lora_cli.adapter.plan import Plan
from lora_cli.adapter.portable import Portable, saved_form
from lora_cli.data.load import Datasets
from lora_cli.errors import ExitCode, UserError
from lora_cli.evaluate import generation
from lora_cli.model import LanguageModel
from lora_cli.recipe.dump import to_yaml
from lora_cli.recipe.schema import Recipe
from lora_cli.run.card import card
from lora_cli.run.curve import smoothed
from lora_cli.run.folder import RunFolder
from lora_cli.run.open import RECIPE, TEMPLATE
from lora_cli.screen import Screen
from lora_cli.train.loop import Training, check_weights


def form(run: Training) -> Portable:
    """What is to be saved. All processes ask: some forms are made of W0, which may be shared out among them.

    Raises:
        UserError: a weight is not a finite number.
    """
    check_weights(run)
    return saved_form(run.adapter)


def adapter(
    folder: RunFolder, run: Training, recipe: Recipe, language: LanguageModel, form: Portable
) -> None:
    """Write adapter/ and read it back.

    Raises:
        UserError: what is on disk is not what was trained.
    """
    model = recipe.model
    with io_ops.new_folder(folder.adapter) as made:
        files.save(made, run.adapter, model.name, model.revision, model.add_tokens, form)
        io_ops.write_text(made / RECIPE, to_yaml(recipe))
        if recipe.data.chat_template not in ("auto", "none"):
            io_ops.write_text(made / TEMPLATE, language.tokenizer.chat_template)
        with without_adapters(run.adapter):
            fits_peft = is_peft(form.plan, run.model)
        io_ops.write_text(made / "README.md", card(recipe, run, folder.lines(), fits_peft))
        if recipe.model.add_tokens:
            language.tokenizer.save_pretrained(made)
        _verify(made, run, form)


def _verify(folder: Path, run: Training, live: Portable) -> None:
    saved = files.read(folder)
    with without_adapters(run.adapter):
        plan = files.plan_of(saved, run.model, run.adapter.plan.ends)
    if not _same(saved.tensors, live.tensors) or not _computes_same(plan, live.plan):
        what = "the adapter on disk is not the one that was trained"
        fix = "the checkpoints are untouched: run again with --resume"
        raise UserError(what, where=str(folder), fix=fix, code=ExitCode.VERIFICATION)


def _same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def _computes_same(found: Plan, expected: Plan) -> bool:
    """Whether two plans make the same of the same tensors."""
    scales = [{spec.name: spec.scale for spec in plan.layers} for plan in (found, expected)]
    parts = [(plan.method.delta, plan.method.combine) for plan in (found, expected) if plan.layers]
    return (
        scales[0].keys() == scales[1].keys()
        and all(math.isclose(scales[0][name], scale, rel_tol=1e-9) for name, scale in scales[1].items())
        and parts[:1] == parts[1:]
    )


def plot(folder: RunFolder) -> None:
    """Draw loss.png from the log."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = folder.lines()
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    held_out = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    axes.plot(*zip(*steps, strict=True), color="#b8c4d9", linewidth=1, label="train, each step")
    axes.plot(*zip(*smoothed(steps), strict=True), color="#2f5b9d", linewidth=1.8, label="train, smoothed")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="#c8553d", marker="o", markersize=4, label="held out")
    axes.set(xlabel="optimizer step", ylabel="loss per trained token (nats)", title=folder.root.name)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    io_ops.write_bytes(folder.plot, buffer.getvalue())


def show_samples(recipe: Recipe, datasets: Datasets, language: LanguageModel, screen: Screen) -> None:
    """Generate answers to the first held-out rows and show them beside the right ones."""
    assert datasets.eval_rows is not None, "the recipe is checked: samples need held-out rows"
    questions = [datasets.format.question(row) for row in islice(datasets.eval_rows(), recipe.eval.samples)]
    answers = generation.answers(
        language.model,
        language.tokenizer,
        [question.prompt_ids for question in questions],
        max_new_tokens=recipe.eval.max_new_tokens,
        batch_size=recipe.eval.batch_size,
    )
    rows = [(q.where, q.answer, a) for q, a in zip(questions, answers, strict=True)]
    screen.table(["row", "expected", "generated"], rows)
