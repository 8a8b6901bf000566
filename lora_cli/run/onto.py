"""Onto which weights a ΔW is merged that was trained on a quantised base: those it was trained with, or the original.

What was trained is W0' + ΔW, W0' being what the codes say. Onto the original weights the same ΔW makes another model,
better or worse: it is made only when asked for. How far either is from what was trained is always said.
"""

from dataclasses import replace
from statistics import median
from typing import Any

from lora_cli import parts
from lora_cli.adapter import files
from lora_cli.adapter.plan import Plan
from lora_cli.adapter.quantised import digest_of
from lora_cli.adapter.saved import Saved
from lora_cli.errors import UserError
from lora_cli.parts import Part
from lora_cli.run.open import other_codes
from lora_cli.run.rewrite import Rewriting
from lora_cli.run.weights import Onto, Weights
from lora_cli.screen import Screen

NAMES: dict[Onto, str] = {"trained": "the dequantised weights", "original": "the original ones"}


def merged_onto(
    weights: Weights, plan: Plan, saved: Saved, onto: Onto, screen: Screen
) -> tuple[Weights, Plan]:
    """The weights with what they were in training, and the plan of what is merged, which quantises nothing any more.

    Raises:
        UserError: there are no others than those that the adapter was trained on, or the codes cannot be made.
    """
    base = plan.method.base
    if base is None and onto == "original":
        what = "there are no other weights than those that the adapter was trained on"
        raise UserError(what, where="--onto original", fix="leave it out")
    if base is not None and _can_be_made(base, onto, screen):
        taken = files.taken_of(saved, weights.language.model)
        names = frozenset(f"{name}.weight" for name in plan.quantised)
        weights = replace(weights, formats=plan.quantised, quantised=names, taken=taken)
    return weights, replace(plan, method=replace(plan.method, base=None), quantised={})


def _can_be_made(base: Part, onto: Onto, screen: Screen) -> bool:
    """Whether the codes of the training can be made here; onto the original weights they are only compared with."""
    try:
        parts.load("base", base.name).require()
    except UserError as error:
        if onto == "trained":
            raise
        screen.warn(f"how far it is from what was trained is not known: {error.what}")
        return False
    return True


def check_codes(work: Rewriting, screen: Screen) -> None:
    """Hold the codes of all layers, which were met one by one, against those of the training.

    Raises:
        UserError: they are others, and it is they that were merged onto.
    """
    codes, packed = work.weights.codes, not work.weights.formats
    if not work.weights.quantised or work.saved.fits_codes(digest_of(codes)):
        return
    if work.onto == "trained":
        raise other_codes(work.saved, packed)
    screen.warn(
        "the codes that are made here are not those of the training, so the distances are to another model"
    )


def report(work: Rewriting) -> dict[str, Any]:
    """Onto what, and how far its layers are from what was trained, there and onto the other weights."""
    if not work.weights.quantised:
        return {"onto": work.onto} if work.onto == "original" else {}
    found = {"onto": work.onto, "from_trained": {onto: _summary(each) for onto, each in work.away.items()}}
    return found | ({"codes_kept": dict(work.weights.recoded)} if work.weights.recoded else {})


def _summary(layers: dict[str, float]) -> dict[str, Any]:
    worst = max(layers, key=lambda name: layers[name])
    return {"median": median(layers.values()), "worst": layers[worst], "worst_layer": worst}


def show(found: dict[str, Any], screen: Screen) -> None:
    """Say onto what, and for either how much of what a layer computes is not what was trained."""
    if found.get("onto") == "original":
        screen.warn(
            "onto the original weights: another model than the one that was trained, on quantised ones"
        )
    for onto, far in found.get("from_trained", {}).items():
        this = " (this merge)" if onto == found["onto"] else f" (--onto {onto})"
        screen.note(
            f"onto {NAMES[onto]}{this}, what a layer computes is {100 * far['median']:.2g} % away from the training "
            f"(median layer), {100 * far['worst']:.2g} % at most ({far['worst_layer']})"
        )
    if kept := found.get("codes_kept"):
        screen.note(
            f"only zero points have moved: {sum(kept.values())} of {len(kept)} adapted layers, quantised to int4 "
            "again from what is written, have the codes that they were trained with"
            + ("" if all(kept.values()) else "; --dtype float32 keeps all")
        )
