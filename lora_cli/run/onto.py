"""Onto which weights a ΔW is merged that was trained on a quantised base: those it was trained with, or the original.

What was trained is W0' + ΔW, W0' being what the codes say. Onto the original weights the same ΔW makes another model,
better or worse: it is made only when asked for.
"""

from dataclasses import replace
from statistics import median
from typing import Any, Literal

from lora_cli.adapter import files
from lora_cli.adapter.plan import Plan
from lora_cli.adapter.saved import Saved
from lora_cli.errors import UserError
from lora_cli.run.weights import Weights
from lora_cli.screen import Screen

Onto = Literal["trained", "original"]


def merged_onto(weights: Weights, plan: Plan, saved: Saved, onto: Onto) -> tuple[Weights, Plan]:
    """The weights that are merged onto, and the plan of what is merged, which quantises nothing any more.

    Raises:
        UserError: the adapter was trained on the original weights.
    """
    base = plan.method.base
    if base is None and onto == "original":
        what = "there are no other weights than those that the adapter was trained on"
        raise UserError(what, where="--onto original", fix="leave it out")
    if base is not None and onto == "trained":
        taken = files.taken_of(saved, weights.language.model)
        names = frozenset(f"{name}.weight" for name in plan.quantised)
        weights = replace(weights, base=base, quantised=names, taken=taken)
    return weights, replace(plan, method=replace(plan.method, base=None), quantised=())


def report(weights: Weights, onto: Onto) -> dict[str, Any]:
    """Onto what, and how far that is from the weights on disk."""
    errors = weights.errors.values()
    if not errors:
        return {"onto": onto} if onto == "original" else {}
    found = {"onto": onto, "quantisation_error": median(errors), "quantisation_errors": dict(weights.errors)}
    return found | ({"codes_kept": dict(weights.recoded)} if weights.recoded else {})


def show(found: dict[str, Any], screen: Screen) -> None:
    """Say onto what, and what that means."""
    if found.get("onto") == "trained":
        screen.note(
            "onto the quantised weights that it was trained on, dequantised: "
            f"{found['quantisation_error']:.1%} away from the original ones (median of the layers); "
            "--onto original takes those"
        )
        if kept := found.get("codes_kept"):
            screen.note(
                f"only zero points have moved: {sum(kept.values())} of {len(kept)} adapted layers, quantised to int4 "
                "again from what is written, have the codes that they were trained with"
                + ("" if all(kept.values()) else "; --dtype float32 keeps all")
            )
    elif "onto" in found:
        screen.warn(
            "onto the original weights: another model than the one that was trained, on quantised ones"
        )
