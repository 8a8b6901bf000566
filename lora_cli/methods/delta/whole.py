"""whole: W itself trains, all of it, in float32; no part of it is low-rank.

Full fine-tuning of the chosen layers, the reference of every comparison. The adapter folder then holds whole weights.
"""

from typing import NoReturn

from lora_cli.adapter.delta import Place

needs = {
    "init.own": "it starts as W0",
    "scale.constant": "there is no ΔW to be scaled",
    "combine.add": "there is no ΔW beside W0",
    "trainable.all": "it is one tensor",
}
forbids = {
    "base.quantized": "every step would be rounded away; train an adapter on it, as qlora does",
    "dropout": "there is no ΔW from whose input something could be dropped",
    "lora_bias": "there is no B: name the biases in adapter.train_also",
    **dict.fromkeys(("r", "rank_pattern"), "it has no rank"),
    "train.parallel": "W trains, and only what is frozen is shared out",
}


def make(place: Place) -> NoReturn:
    """Never called: the plan lists W among the parameters that are trained in full."""
    raise AssertionError("a whole weight is no delta")


def shapes(in_features: int, out_features: int, r: int) -> dict[str, tuple[int, ...]]:
    """As W0."""
    return {"W": (out_features, in_features)}
