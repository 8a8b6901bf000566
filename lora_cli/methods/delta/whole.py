"""whole: W itself trains, all of it, in float32; no part of it is low-rank.

Full fine-tuning of the chosen layers, the reference of every comparison. The adapter folder then holds whole weights.
"""

from typing import NoReturn

from lora_cli.adapter.delta import Place

needs = {"init.own": "it starts as W0"}


def make(place: Place) -> NoReturn:
    """Never called: the plan lists W among the parameters that are trained in full."""
    raise AssertionError("a whole weight is no delta")


def shapes(in_features: int, out_features: int, r: int) -> dict[str, tuple[int, ...]]:
    """As W0."""
    return {"W": (out_features, in_features)}
