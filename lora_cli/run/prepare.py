"""From a recipe to everything that training needs; `check` goes the first half of the way."""

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from lora_cli import attention, io_ops, kernels, parts, presets
from lora_cli import model as models
from lora_cli.adapter import files, peft_format, rules
from lora_cli.adapter import plan as plans
from lora_cli.adapter.inject import inject
from lora_cli.adapter.plan import Plan
from lora_cli.data import load as data
from lora_cli.data.load import Datasets
from lora_cli.data.pack import check_isolation, epoch_order
from lora_cli.errors import ExitCode, UserError
from lora_cli.model import DTYPES, LanguageModel
from lora_cli.recipe.schema import ModelRecipe, Recipe, TrainRecipe
from lora_cli.screen import Screen
from lora_cli.train import compiled, optim
from lora_cli.train.elementwise import keep_less
from lora_cli.train.loop import Training
from lora_cli.train.measure import measure
from lora_cli.train.processes import Processes
from lora_cli.train.recompute import recompute
from lora_cli.train.sharding import share_out

MEASURED_ROWS = 32
"""Training rows that an init looks at which has no setting for it."""


def check_method(recipe: Recipe) -> None:
    """Refuse what does not go together, before anything is loaded.

    Raises:
        UserError: with the reasons that the parts give.
    """
    if recipe.model.revision is not None and Path(recipe.model.name).is_dir():
        what, fix = "a folder has no revisions", "leave it out, or name an id on the Hub"
        raise UserError(what, where="model.revision", fix=fix)
    method = presets.resolve(recipe.adapter, recipe.train.optimizer, recipe.model.quantize)
    rank = {"r"} if "r" in recipe.adapter.model_fields_set and recipe.adapter.r is not None else set[str]()
    rules.check(method, rules.facts_of(method, recipe.adapter) | rank | _changed(recipe.train))
    if method.attention.name != "full" and recipe.model.attention in ("eager", "flash_attention_2"):
        what = (
            f"adapter.attention: {method.attention.name} stands in for sdpa, not for {recipe.model.attention}"
        )
        raise UserError(what, where="model.attention", fix="leave it out, or set sdpa")
    _refuse_plain(recipe)
    if method.base is not None:
        parts.load("base", method.base.name).require()
        plans.check_in_full(presets.with_defaults(recipe.adapter), quantised=True)
    if method.base is not None and recipe.model.split_experts:
        what, fix = "experts that are taken apart stay as they are stored", "leave one of the two out"
        raise UserError(f"{what}, and would not be quantised", where="model.split_experts", fix=fix)
    if recipe.train.compile:
        compiled.check(recipe, method)


def _refuse_plain(recipe: Recipe) -> None:
    """Refuse to take back the few bits that a method is named after; what is stored in such has them anyway.

    Raises:
        UserError: with the name of what would be trained.
    """
    made_of = presets.PRESETS[recipe.adapter.method].parts
    if "base" not in made_of or recipe.model.quantize != "none" or models.is_packed(recipe.model):
        return
    rest = {axis: part for axis, part in made_of.items() if axis != "base"}
    plain = next((name for name, preset in presets.PRESETS.items() if preset.parts == rest), "another method")
    what = f"{recipe.adapter.method} is for a base in few bits; on a plain one it would be {plain}"
    fix = f"leave model.quantize out, or set adapter.method: {plain}"
    raise UserError(what, where="model.quantize: none", fix=fix)


def resolved(recipe: Recipe) -> Recipe:
    """The recipe with what its method sets where it does not itself: read again, it asks for the same."""
    method, adapter = presets.resolve(recipe.adapter), presets.with_defaults(recipe.adapter)
    if "r" in rules.stated("forbids", "delta", method.delta):
        adapter = adapter.model_copy(update={"r": None})
    return recipe.model_copy(update={"adapter": adapter})


def model_of(recipe: Recipe) -> ModelRecipe:
    """The section on the model, with what the method quantises it to where the recipe does not say."""
    base = presets.resolve(recipe.adapter, quantize=recipe.model.quantize).base
    return recipe.model.model_copy(update={"quantize": base and base.name})


def _changed(train: TrainRecipe) -> set[str]:
    """Keys of `train` that are not what they are by themselves."""
    return {f"train.{key}" for key, value in train if value != TrainRecipe.model_fields[key].default}


def plan_for(recipe: Recipe, language: LanguageModel) -> Plan:
    """The plan for a model in memory (or on the meta device)."""
    return plans.make(
        recipe.adapter,
        language.model,
        language.ends,
        language.new_rows,
        untied=recipe.model.untie,
        optimizer=recipe.train.optimizer,
        quantize=recipe.model.quantize,
        bits=recipe.model.bits,
    )


def shares_out(recipe: Recipe, accelerator: Accelerator) -> bool:
    """Whether the base is shared out among the processes."""
    return recipe.train.parallel == "fsdp" and accelerator.num_processes > 1


def load_model(recipe: Recipe, accelerator: Accelerator) -> LanguageModel:
    """The model, on the device; a base that is to be shared out stays on the CPU until then.

    There its files are mapped, not read, where they have the type that it is kept in: then no process ever has more
    than its share in memory of its own.

    Raises:
        UserError: every block would be kept whole after all, in the type that it computes in.
    """
    if not shares_out(recipe, accelerator):
        return models.load(model_of(recipe), accelerator.device)
    stored, computed = models.stored_dtype(recipe.model, accelerator.device), recipe.train.precision
    if computed not in ("auto", "float32") and stored is not DTYPES[computed]:
        what = f"a base that is computed in {computed} but stored in {str(stored).removeprefix('torch.')} is cast "
        what += "block by block, and the casts are kept"
        raise UserError(what, where="train.parallel: fsdp", fix=f"set model.dtype: {computed}")
    return models.load(model_of(recipe).model_copy(update={"dtype": str(stored).removeprefix("torch.")}))


def load_data(recipe: Recipe, tokenizer: Any, cache: Path) -> Datasets:
    """Tokenise the rows, or find them tokenised."""
    return data.load(
        recipe.data, tokenizer, cache=cache, seed=recipe.train.seed, references=recipe.eval.references
    )


def check_fit(model: PreTrainedModel, datasets: Datasets) -> None:
    """Refuse ids and lengths that the model has no rows for, before the first step.

    Raises:
        UserError: naming both numbers.
    """
    rows = models.end_modules(model)[0].weight.shape[0]
    positions = models.max_positions(model)
    for examples in (datasets.train, datasets.eval):
        if examples is None:
            continue
        if examples.max_id >= rows:
            what = f"the data has token id {examples.max_id}, the model's embedding has {rows} rows"
            raise UserError(
                what, where="model.name", fix="use the model's own tokenizer", code=ExitCode.MODEL
            )
        if positions is not None and examples.longest > positions:
            what = f"the longest example has {examples.longest} tokens, the model has {positions} positions"
            raise UserError(
                what, where="data.max_length", fix=f"set it to {positions} at most", code=ExitCode.MODEL
            )


def training(
    recipe: Recipe, language: LanguageModel, datasets: Datasets, accelerator: Accelerator, screen: Screen
) -> Training:
    """Inject the adapter, make the optimizer, and put the model in training mode; `screen` shows how far it is."""
    plan = plan_for(recipe, language)
    check_fit(language.model, datasets)
    precision = precision_of(recipe, language.model, accelerator.device)
    plan, statistics = _measured(plan, language, datasets, recipe.train.seed, precision, accelerator)
    shared = shares_out(recipe, accelerator)
    if shared:
        files.note_signs(language.model, plan)
    with screen.counting("starting layers", len(plan.touched)) as counter:
        adapter = inject(language.model, plan, recipe.train.seed, statistics, advance=counter.advance)
    if plan.quantised and not shared:
        language.model.to(accelerator.device)  # pyright: ignore[reportArgumentType]
    if not recipe.train.compile:  # compiled code fuses by itself, and sees what is worth keeping
        _fuse(language.model, accelerator.device, precision, screen)
        keep_less(language.model)
    shares = share_out(language.model, adapter, accelerator) if shared else None
    with models.computing(language.model):
        packing = _packs(recipe, language.model)
    attention.train_with(language.model, plan.method.attention)
    if asked := recipe.train.gradient_checkpointing:
        recompute(language.model, None if asked is True else asked)
    language.model.train()
    run = Training(
        model=language.model,
        adapter=adapter,
        examples=datasets.train,
        optimizer=optim.make(adapter, recipe.train),
        train=recipe.train,
        accelerator=accelerator,
        precision=precision,
        packing=packing,
        pad_id=language.pad_id,
        shares=shares,
        say=screen.note,
    )
    if recipe.train.compile:  # last: what was tried out before is not worth compiling
        compiled.compile_blocks(language.model)
    return run


def _fuse(model: PreTrainedModel, device: torch.device, precision: torch.dtype, screen: Screen) -> None:
    """Compute norms and gated activations by kernels where there are some that do what they should, and say so."""
    if not kernels.serve(device):
        return
    try:
        count = kernels.use(model, device, precision)
    except kernels.UnfitError as error:
        screen.warn(f"training without liger-kernel, which does not work here: {error}")
        return
    if count:
        screen.note(f"liger-kernel computes {count} norms and gated activations")


def _packs(recipe: Recipe, model: PreTrainedModel) -> bool:
    """Whether to pack.

    Raises:
        UserError: the recipe wants it, and the model does not keep documents apart.
    """
    wanted = recipe.data.packing
    if not wanted or (wanted == "auto" and not attention.skips(model)):
        return False
    before = str(model.config._attn_implementation)
    attention.use(model)
    try:
        check_isolation(model)
    except UserError:
        model.set_attn_implementation(before)
        if wanted == "auto":
            return False
        check_isolation(model)  # some models tell documents apart by masks only, which cost more
    return True


def _measured(
    plan: Plan,
    language: LanguageModel,
    datasets: Datasets,
    seed: int,
    precision: torch.dtype,
    accelerator: Accelerator,
) -> tuple[Plan, dict[str, Tensor]]:
    """What the init asks to know, on training rows drawn by lot; it may share the ranks out anew."""
    part = plan.method.init
    init = parts.load("init", part.name)
    if not hasattr(init, "measures"):
        return plan, {}
    settings = parts.settings("init", part)
    order = epoch_order(datasets.train, seed, 0)
    statistics = measure(
        init.measures,
        language.model,
        {name: peft_format.base_of(language.model, name) for name in plan.measured},
        datasets.train,
        [int(row) for row in order[: settings.get("rows", MEASURED_ROWS)]],
        precision=precision,
        pad_id=language.pad_id,
    )
    Processes(accelerator).start_alike([*statistics.values()])
    if hasattr(init, "ranks"):
        plan = plans.with_ranks(plan, init.ranks({s.name: s.r for s in plan.layers}, statistics, **settings))
    return plan, statistics


def precision_of(recipe: Recipe, model: PreTrainedModel, device: torch.device) -> torch.dtype:
    """`auto`: what the base is stored in if that is 16 bits, else bfloat16 on GPUs that have it, else float32."""
    if recipe.train.precision != "auto":
        return DTYPES[recipe.train.precision]
    stored = models.stored_as(model)
    if stored in (torch.bfloat16, torch.float16):
        return stored
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def cache_folder(run_folder: Path) -> Path:
    """$LORA_CACHE, or a folder of the run.

    Raises:
        UserError: the run's is a link, which would lead what is written there elsewhere.
    """
    if named := os.environ.get("LORA_CACHE"):
        return Path(named)
    io_ops.refuse_strange(run_folder)
    return run_folder / "cache"
