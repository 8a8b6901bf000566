"""Whether a run fits in the memory that is free, asked before the first step; and what is done where it does not."""

import os
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from accelerate import Accelerator

from lora_cli import attention
from lora_cli import model as models
from lora_cli.adapter.quantised import Quantised
from lora_cli.analyze import devices
from lora_cli.analyze.imagined import LONG
from lora_cli.analyze.memory import (
    Case,
    at_most,
    largest,
    memory,
    sharded,
    smaller,
)
from lora_cli.analyze.rehearse import rehearsal
from lora_cli.analyze.steps import Documents, steps_of
from lora_cli.data.load import Datasets
from lora_cli.data.pack import epoch_order
from lora_cli.errors import ExitCode, UnknownCostError, UserError
from lora_cli.model import LanguageModel
from lora_cli.recipe.schema import Recipe
from lora_cli.run import prepare
from lora_cli.screen import Screen, size
from lora_cli.train.gradient import shrink_alike, token_budget
from lora_cli.train.loop import Training

MARGIN = 0.95
"""Share of the free memory that a run is given: other programs take some, too."""


@dataclass(frozen=True)
class Fitting:
    """A recipe that fits, and how much of a step is computed at once."""

    recipe: Recipe
    """Differs from the one that was asked for in what never changes what is learned."""
    max_tokens: int | None = None
    """At once; None: as the recipe says."""

    def apply(self, run: Training) -> None:
        """Let a run take so much at once, in all processes what fits in each."""
        if self.max_tokens is not None and run.max_tokens is not None:
            run.max_tokens = self.max_tokens
        shrink_alike(run)


def fitted(
    recipe: Recipe, language: LanguageModel, datasets: Datasets, accelerator: Accelerator, screen: Screen
) -> Fitting:
    """Do what `train.on_no_fit` says where the run would need more memory than is free.

    Nothing is rehearsed where a plain bound says that there is plenty.

    Raises:
        UserError: it does not fit, and is not to be tried, or cannot be made to.
    """
    if any(isinstance(module, Quantised) for module in language.model.modules()):
        return Fitting(recipe)  # what codes in its files take is not foretold
    device, examples = accelerator.device, datasets.train
    limit = MARGIN * (devices.free_memory(device) / _beside(device) + _taken(device))
    longest = int(examples.lengths.max())
    if at_most(language.model, max(longest, _at_once(recipe, device, longest)), longest) < limit:
        return Fitting(recipe)
    try:
        with screen.waiting("rehearsing, to know whether it fits"):
            return _rehearsed(recipe, language, datasets, accelerator, screen, limit)
    except UnknownCostError as error:
        screen.warn(f"nobody knows whether this fits: {error.what}")
        return Fitting(recipe)


def _rehearsed(
    recipe: Recipe,
    language: LanguageModel,
    datasets: Datasets,
    accelerator: Accelerator,
    screen: Screen,
    limit: float,
) -> Fitting:
    """The same, after a rehearsal of the largest micro-batch."""
    device, examples = accelerator.device, datasets.train
    documents = Documents(np.asarray(examples.lengths), np.asarray(examples.trained_counts))
    target, packing = devices.of_machine(device), recipe.data.packing
    packing = attention.skips(language.model) if packing == "auto" else packing
    steps = steps_of(
        documents,
        epoch_order(examples, recipe.train.seed, 0),
        recipe.train,
        packing=packing,
        budget=token_budget(device),
        processes=accelerator.num_processes,
    )
    with rehearsal(
        recipe,
        lambda made: prepare.plan_for(recipe, made),
        tokenizer=models.load_tokenizer(recipe.model) if recipe.model.add_tokens else None,
        stored=models.stored_dtype(recipe.model, device),
        precision=prepare.precision_of(recipe, language.model, device),
        device=device,
        steps=recipe.train.max_steps or LONG,
        examples=len(examples),
    ) as rehearsed:
        case = largest(rehearsed, recipe.train, steps)
        whole = memory(rehearsed, case, target)
        sharing = accelerator.num_processes if prepare.shares_out(recipe, accelerator) else 1
        peak = sharded(whole, rehearsed, sharing).peak
        if peak <= limit:
            return Fitting(recipe)
        needs = f"the run needs about {size(peak, 1024)}B of memory, {size(limit, 1024)}B are free"
        limit += whole.peak - peak  # what the others keep does not depend on how much is computed at once
        if recipe.train.on_no_fit == "warn":
            screen.warn(needs)
            return Fitting(recipe)
        less = smaller(rehearsed, case, target, limit)
    if recipe.train.on_no_fit == "error" or less is None:
        raise UserError(
            needs if less else f"{needs}; recomputing all blocks, one row at once, is not enough",
            where="train.on_no_fit",
            fix=_advice(less),
            code=ExitCode.OUT_OF_MEMORY,
        )
    screen.warn(f"{needs}: {_advice(less)}, which is slower and learns the same")
    return _adapted(recipe, less)


def _taken(device: torch.device) -> float:
    """Bytes that this process has already of what it will need."""
    if device.type == "cuda":
        return devices.of_machine(device).floor + torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def _beside(device: torch.device) -> int:
    """Processes of this run that share the memory: on a CPU all of the machine."""
    return 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _at_once(recipe: Recipe, device: torch.device, longest: int) -> int:
    """Most cells of a micro-batch."""
    rows = recipe.train.micro_batch_size
    return token_budget(device) if rows == "auto" else min(rows, recipe.train.batch_size) * longest


def _advice(less: Case | None) -> str:
    if less is None:
        return "a smaller data.max_length, a smaller model, or train.on_no_fit: warn to try all the same"
    return f"train.gradient_checkpointing: {less.recomputed}, {less.rows.cells:,} tokens at once"


def _adapted(recipe: Recipe, less: Case) -> Fitting:
    train = recipe.train.model_copy(update={"gradient_checkpointing": less.recomputed or False})
    if train.micro_batch_size != "auto":
        train = train.model_copy(update={"micro_batch_size": len(less.rows.lengths)})
    return Fitting(recipe.model_copy(update={"train": train}), less.rows.cells)
