"""`lora estimate`: what a run would cost, before it is paid. No weights are read, nothing is trained."""

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_cli import attention, parts
from lora_cli import model as models
from lora_cli.analyze import calibrate, devices
from lora_cli.analyze.devices import Device
from lora_cli.analyze.duration import Rates, computed_pairs, seconds
from lora_cli.analyze.imagined import LONG
from lora_cli.analyze.memory import (
    Case,
    Memory,
    decoding,
    gathered,
    largest,
    memory,
    sharded,
)
from lora_cli.analyze.rehearse import Rehearsal, Rows, rehearsal
from lora_cli.analyze.steps import Documents, steps_of
from lora_cli.analyze.tally import Work
from lora_cli.analyze.tape import Cost
from lora_cli.data.pack import epoch_order
from lora_cli.errors import UserError
from lora_cli.recipe.load import Loaded
from lora_cli.recipe.schema import Recipe
from lora_cli.run import advice, prepare
from lora_cli.screen import Screen, duration, size
from lora_cli.train.gradient import token_budget

LINKS = 25e9
"""Bytes/s between two devices: of PCIe 4. NVLink has more."""


@dataclass(frozen=True)
class Data:
    """What is known of the rows."""

    documents: Documents
    order: np.ndarray
    steps: int | None
    """Of the whole run; None where nobody knows how many rows there are."""
    read: bool
    """Whether these are the recipe's rows, or stand for them."""


@dataclass(frozen=True)
class Pace:
    """How fast a run goes."""

    tokens_per_second: float
    seconds: float | None
    """Of the whole run."""
    flops_per_token: float
    of_products: float
    """Share of the device's rate of matrix products."""


def estimate(
    loaded: Loaded, screen: Screen, *, device: str | None, gpus: int, measure: bool
) -> dict[str, Any]:
    """Predict memory and time of a recipe, show them, and return them.

    Args:
        loaded: the recipe.
        screen: shows it.
        device: a name of `devices.GPUS`, `cpu`, or None for what this machine would train on.
        gpus: devices that share the rows of a step.
        measure: this machine, for a few seconds.

    Raises:
        UserError: the recipe, the model's configuration or the data are wrong.
    """
    recipe, shard = loaded.recipe, loaded.recipe.train.parallel == "fsdp"
    prepare.check_method(recipe)
    kind, target = _target(device, measure)
    with screen.waiting("reading the rows"):
        data, tokenizer = _data(recipe)
    if measure:
        shapes = calibrate.shapes_of(models.skeleton(recipe.model))
        target = calibrate.calibrated(shapes, kind, _name(_precision(recipe, kind)), token_budget(kind))
    about = f"rehearsing {recipe.model.name} without its weights"
    with screen.waiting(about), _rehearsed(recipe, tokenizer, kind, data) as rehearsed:
        steps = _steps(rehearsed, data, recipe, kind, gpus)
        case = largest(rehearsed, recipe.train, steps)
        found = sharded(memory(rehearsed, case, target), rehearsed, gpus if shard else 1)
        speed = pace(rehearsed, case, steps, target, gpus, shard, data.steps)
        ways = advice.ways(recipe, rehearsed, case, target, gpus) if found.peak > target.memory else []
        report = {
            "device": target.name,
            "gpus": gpus,
            "rows": "the recipe's" if data.read else "of data.max_length tokens, all learned",
            "micro_batch": {"tokens": case.rows.cells, "documents": len(case.rows.lengths)},
            "recomputed_blocks": case.recomputed,
            "memory": {
                **{key: round(value) for key, value in vars(found).items()},
                "peak": round(found.peak),
            },
            "device_memory": round(target.memory),
            "fits": found.peak <= target.memory,
            "peaks": {key: round(value) for key, value in _peaks(recipe, rehearsed, case, target).items()},
            "pace": asdict(speed) if speed else None,
            "changes": [{"change": key, "peak": round(value)} for key, value in ways],
            "too_large": _alone(found) > target.memory,
        }
    show(report, recipe, screen)
    return report


def _target(name: str | None, measure: bool) -> tuple[torch.device, Device]:
    """Where the run would be, and what that can do.

    Raises:
        UserError: another device is to be measured than there is.
    """
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name is None:
        return here, devices.of_machine(here)
    if name == "cpu":
        return torch.device("cpu"), devices.this_cpu()
    if measure:
        what, fix = "only this machine can be measured", "leave --device or --calibrate out"
        raise UserError(what, where=f"--device {name}", fix=fix)
    return torch.device("cuda"), devices.named(name)


def _data(recipe: Recipe) -> tuple[Data, Any]:
    """The recipe's rows as training would read them; where the model has no tokenizer, rows as long as they may be."""
    if not _has_tokenizer(recipe):
        if recipe.model.add_tokens:
            models.load_tokenizer(recipe.model)  # says what is missing
        rows = recipe.train.batch_size
        lengths = np.full(rows, recipe.data.max_length)
        return Data(
            Documents(lengths, lengths - 1), np.arange(rows), recipe.train.max_steps, read=False
        ), None
    tokenizer = models.load_tokenizer(recipe.model)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(str(recipe.output.dir))
        cache = prepare.cache_folder(folder if folder.exists() else Path(scratch))
        examples = prepare.load_data(recipe, tokenizer, cache).train
        order = epoch_order(examples, recipe.train.seed, 0)
        documents = Documents(np.array(examples.lengths), np.array(examples.trained_counts))
    epochs = (recipe.train.epochs or 1) * -(-len(order) // recipe.train.batch_size)
    return Data(documents, order, recipe.train.max_steps or int(np.ceil(epochs)), read=True), tokenizer


def _has_tokenizer(recipe: Recipe) -> bool:
    """An id on the Hub has one; a folder may hold the configuration alone."""
    folder = Path(recipe.model.name)
    return not folder.is_dir() or any(folder.glob("token*")) or any(folder.glob("vocab*"))


@contextmanager
def _rehearsed(recipe: Recipe, tokenizer: Any, device: torch.device, data: Data) -> Iterator[Rehearsal]:
    """The run in the types that it would have on the device."""
    with rehearsal(
        recipe,
        lambda language: prepare.plan_for(recipe, language),
        tokenizer=tokenizer if recipe.model.add_tokens else None,
        stored=_stored(recipe, device),
        precision=_precision(recipe, device),
        device=device,
        steps=data.steps or LONG,
        examples=len(data.documents) if data.read else LONG,
    ) as rehearsed:
        yield rehearsed


def _stored(recipe: Recipe, device: torch.device) -> torch.dtype:
    """As `models.stored_dtype`, also of GPUs that are elsewhere: those of the table have bfloat16."""
    if recipe.model.dtype == "auto" and device.type == "cuda":
        return torch.bfloat16
    return models.stored_dtype(recipe.model, device)


def _precision(recipe: Recipe, device: torch.device) -> torch.dtype:
    """As `prepare.precision_of`, of a model that is not there."""
    asked, stored_as = recipe.train.precision, _stored(recipe, device)
    if asked != "auto" or (stored_as is torch.float32 and device.type == "cuda"):
        return models.DTYPES[asked if asked != "auto" else "bfloat16"]
    return stored_as


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _steps(
    rehearsed: Rehearsal, data: Data, recipe: Recipe, device: torch.device, processes: int
) -> list[list[Rows]]:
    """Micro-batches of some steps."""
    packing, model = recipe.data.packing, rehearsed.model
    if packing == "auto":
        packing = recipe.model.attention == "flash_attention_2" or attention.skips(model, device)
    return steps_of(
        data.documents,
        data.order,
        recipe.train,
        packing=packing,
        budget=token_budget(device),
        processes=processes,
    )


def pace(
    rehearsed: Rehearsal,
    case: Case,
    steps: list[list[Rows]],
    device: Device,
    gpus: int,
    shard: bool,
    total: int | None = None,
) -> Pace | None:
    """Tokens a second over all devices; None of a device that nobody has measured.

    Args:
        rehearsed: the run.
        case: of the largest micro-batch.
        steps: micro-batches that one device has in some of the steps.
        device: one of them.
        gpus: how many share a step.
        shard: whether they share the base, too.
        total: steps of the whole run.
    """
    kind = _name(rehearsed.precision)
    if device.rate(kind) == 0:
        return None
    batches = Counter(rows for step in steps for rows in step)
    found = _passes(rehearsed, rehearsed.cost(case.rows, case.recomputed), case.rows, batches, device)
    share = 1 + rehearsed.run.doubled
    taken, work = found[0] * share, found[1] * share
    tokens = share * sum(count * sum(rows.lengths) for rows, count in batches.items())
    for number, count in Counter(map(len, steps)).items():
        taken += count * seconds(rehearsed.update, device, kind)
        taken += count * _sent(rehearsed, number, gpus, shard) / LINKS
    work += rehearsed.update * len(steps)
    once = len(steps) / rehearsed.run.total_steps
    for what, rows in rehearsed.run.looks.items():
        looked = _looks(rehearsed, what, case, batches, device)
        taken, work = taken + once * rows * looked[0], work + looked[1] * (once * rows)
    first, start = rehearsed.run.measures, 0.0
    if first is not None:
        init = rehearsed.adapter.plan.method.init
        rows = parts.settings("init", init).get("rows", prepare.MEASURED_ROWS)
        start = rows * _looks(rehearsed, first, case, batches, device)[0]
    # A step of all devices takes as long as that of one, which has its share of the rows.
    return Pace(
        tokens_per_second=gpus * tokens / taken,
        seconds=None if total is None else start + total * taken / len(steps),
        flops_per_token=work.flops / tokens,
        of_products=work.flops / taken / device.rate(kind),
    )


def _passes(
    rehearsed: Rehearsal, cost: Cost, rows: Rows, batches: Mapping[Rows, int], device: Device
) -> tuple[float, Work]:
    """Seconds and work of micro-batches, each as often as it is there, from the cost of one of them."""
    rates, decoded = Rates.of(cost, rows), Work(moved=decoding(rehearsed))
    taken, work = 0.0, Work()
    for each, count in batches.items():
        done = rates.work(each) + decoded
        taken += count * seconds(
            done, device, _name(rehearsed.precision), computed_pairs(device, each.lengths)
        )
        work += done * count
    return taken, work


def _looks(
    rehearsed: Rehearsal, what: str, case: Case, batches: Counter[Rows], device: Device
) -> tuple[float, Work]:
    """Seconds and work of looking at one row, on average; what is measured of layers is so one row at a time."""
    if what != "loss":
        batches = _one_by_one(batches)
    taken, work = _passes(rehearsed, rehearsed.look(what, case.rows), case.rows, batches, device)
    rows = sum(len(each.lengths) * count for each, count in batches.items())
    return taken / rows, work * (1 / rows)


def _one_by_one(batches: Mapping[Rows, int]) -> Counter[Rows]:
    """The rows of these micro-batches, one at a time."""
    found = Counter[Rows]()
    for rows, count in batches.items():
        for length in rows.lengths:
            found[Rows((length,), round(rows.trained * length / sum(rows.lengths)), packed=False)] += count
    return found


def _sent(rehearsed: Rehearsal, batches: int, gpus: int, shard: bool) -> float:
    """Bytes that a device sends in a step: the gradient once; of a shared base what comes together for it."""
    share = (gpus - 1) / gpus
    base = batches * gathered(rehearsed) * share if shard else 0.0
    return 2 * rehearsed.held.gradients * share + base


def _peaks(recipe: Recipe, rehearsed: Rehearsal, case: Case, device: Device) -> dict[str, float]:
    """What the choices that change memory would make of it."""
    everything = replace(case, recomputed=len(rehearsed.blocks))
    found = {"recompute nothing": memory(rehearsed, replace(case, recomputed=0), device).peak}
    found["recompute all blocks"] = memory(rehearsed, everything, device).peak
    for kind in advice.kinds(recipe, rehearsed):
        other = advice.kept_in(rehearsed, kind)
        found[f"model.quantize: {kind}"] = memory(other, case, device).peak
        found[f"model.quantize: {kind}, recompute all blocks"] = memory(other, everything, device).peak
    now = memory(rehearsed, case, device)
    for count in (2, 4, 8):
        shared = sharded(now, rehearsed, count)
        if shared.weights < now.weights:  # else all of it trains
            found[f"train.parallel: fsdp, {count} devices"] = shared.peak
    return found


def _alone(found: Memory) -> float:
    """Bytes that are there whatever is computed at once."""
    return found.process + found.weights + found.adapter + found.optimizer


MEANING = {
    "process": "libraries, or the context of a GPU",
    "weights": "of the model, as they are stored",
    "adapter": "what trains, in float32, and what the method keeps",
    "gradients": "that wait for the other micro-batches of a step",
    "optimizer": "its memory of what trains",
    "activations": "kept for the backward pass",
    "passing": "logits, gradients of activations, blocks computed again",
    "allocator": "holds this without use",
}


def show(report: dict[str, Any], recipe: Recipe, screen: Screen) -> None:
    """Where the memory goes, what would change it, and how long it takes."""
    gpus, batch = report["gpus"], report["micro_batch"]
    where = f"{gpus} × {report['device']}" if gpus > 1 else report["device"]
    screen.heading(f"{recipe.model.name} on {where}, predicted")
    found, limit = report["memory"], report["device_memory"]
    unit = "GiB" if found["peak"] >= 2**30 else "MiB"
    rows = [(key, _in(unit, found[key]), meaning) for key, meaning in MEANING.items()]
    screen.table(["memory", unit, ""], [*rows, ("peak", _in(unit, found["peak"]), _verdict(report))])
    screen.note(
        f"with {batch['tokens']:,} tokens at once in {batch['documents']} documents ({report['rows']}), "
        f"{report['recomputed_blocks']} blocks recomputed"
    )
    screen.heading("peak with other choices")
    other = [
        (what, _in(unit, peak), "" if peak <= limit else "too much") for what, peak in report["peaks"].items()
    ]
    screen.table(["", unit, ""], other)
    _show_pace(report, screen)
    if not report["fits"]:
        _show_changes(report, screen)


def _show_changes(report: dict[str, Any], screen: Screen) -> None:
    screen.heading("to make it fit, one of these, the gentlest first")
    for each in report["changes"]:
        screen.note(f"  {each['change']}  ({_in('GiB', each['peak']):g} GiB)")
    if report["changes"]:
        return
    what = "what does not depend on the rows is too large already: a smaller model, or a larger device"
    screen.note(f"  {what if report['too_large'] else 'nothing but a smaller data.max_length'}")


def _show_pace(report: dict[str, Any], screen: Screen) -> None:
    found = report["pace"]
    screen.heading("time")
    if found is None:
        screen.note(
            "nobody has measured this machine: --calibrate does, in a few seconds; or name a GPU, --device H100"
        )
        return
    whole = "" if found["seconds"] is None else f", {_about(found['seconds'])} for the run"
    screen.note(
        f"{found['tokens_per_second']:,.0f} tokens/s{whole}; {size(found['flops_per_token'])}FLOP a token, "
        f"at {found['of_products']:.0%} of what products alone would reach"
    )


def _about(seconds: float) -> str:
    return duration(seconds) if seconds >= 1 else "less than a second"


def _verdict(report: dict[str, Any]) -> str:
    of = f"of {report['device_memory'] / 2**30:.0f} GiB"
    return f"{of}: fits" if report["fits"] else f"{of}: DOES NOT FIT"


UNITS = {"GiB": 2**30, "MiB": 2**20}


def _in(unit: str, count: float) -> float:
    """Three digits, and all before the point."""
    value = count / UNITS[unit]
    return round(value) if value >= 100 else float(f"{value:.3g}")
