"""What to change so that a run fits, the gentlest first: what learns the same, more devices, then fewer bits."""

import copy
from collections.abc import Iterator
from contextlib import suppress

from lora_cli.analyze.devices import Device
from lora_cli.analyze.memory import Case, memory, sharded, smaller
from lora_cli.analyze.rehearse import Rehearsal
from lora_cli.errors import UserError
from lora_cli.recipe.schema import Recipe
from lora_cli.run import prepare

DEVICES = (2, 4, 8, 16, 32, 64)
"""That a base may be shared out over."""
BITS = (None, "int8", "nf4")
"""How a base may be kept: as it is, and in fewer bits, which changes what is learned a little."""


def ways(
    recipe: Recipe, rehearsed: Rehearsal, case: Case, device: Device, gpus: int
) -> list[tuple[str, float]]:
    """What each of them changes of the recipe, and the peak that is left, in bytes; each is enough by itself."""
    found: list[tuple[str, float]] = []
    for kind in BITS:
        if kind is not None and kind not in kinds(recipe, rehearsed):
            continue
        here = kept_in(rehearsed, kind)
        changed = {} if kind is None else {"model.quantize": kind}
        sharing = gpus if recipe.train.parallel == "fsdp" else 1
        for count in _counts(recipe, kind, sharing):
            shared = {} if count == sharing else {"train.parallel": f"fsdp, on {count} devices"}
            fitting = way(here, case, device, count)
            if fitting is not None:
                fewer, peak = fitting
                found.append((_told(changed | shared | _less(here, case, fewer)), peak))
                break
    return found


def kinds(recipe: Recipe, rehearsed: Rehearsal) -> list[str]:
    """What the base may be quantised to that is not quantised: the method may write to it."""
    return [kind for kind in BITS if kind and rehearsed.base is None and _allowed(recipe, quantize=kind)]


def kept_in(rehearsed: Rehearsal, kind: str | None) -> Rehearsal:
    """The same rehearsal of a base that is kept as `kind`; None: as it is."""
    if kind is None:
        return rehearsed
    other = copy.copy(rehearsed)
    other.base = kind
    return other


def _counts(recipe: Recipe, kind: str | None, sharing: int) -> Iterator[int]:
    """Over how many devices the base may be shared out, from what was asked for on."""
    yield sharing
    if _allowed(recipe, quantize=kind or recipe.model.quantize, parallel="fsdp"):
        yield from (count for count in DEVICES if count > sharing)


def _allowed(recipe: Recipe, quantize: str | None, parallel: str | None = None) -> bool:
    model = recipe.model.model_copy(update={"quantize": quantize})
    train = recipe.train.model_copy(update={"parallel": parallel or recipe.train.parallel})
    with suppress(UserError):
        prepare.check_method(recipe.model_copy(update={"model": model, "train": train}))
        return True
    return False


def way(rehearsed: Rehearsal, case: Case, device: Device, count: int) -> tuple[Case, float] | None:
    """With as little recomputed, and as much at once, as fits with the base shared out over devices; and its peak."""
    whole = memory(rehearsed, case, device)
    saved = whole.peak - sharded(whole, rehearsed, count).peak  # whatever is recomputed
    fewer = smaller(rehearsed, case, device, device.memory + saved)
    return None if fewer is None else (fewer, memory(rehearsed, fewer, device).peak - saved)


def _less(rehearsed: Rehearsal, case: Case, fewer: Case) -> dict[str, object]:
    """What differs between two cases, by keys of the recipe."""
    changed: dict[str, object] = {}
    if fewer.recomputed != case.recomputed:
        every = fewer.recomputed == len(rehearsed.blocks)
        of = f"{fewer.recomputed} (of {len(rehearsed.blocks)} blocks)"
        changed["train.gradient_checkpointing"] = "true" if every else of
    if fewer.rows != case.rows:
        changed["train.micro_batch_size"] = len(fewer.rows.lengths)
    return changed


def _told(changed: dict[str, object]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in changed.items())
