"""none: no ΔW at all; what `train_also` names is all that trains.

For methods that tune a few of the model's own parameters: its biases (`method: bitfit`) or its norms (`ln_tuning`).
"""

from typing import NoReturn

from lora_cli.adapter.delta import Place

needs = {
    "train_also": "nothing would train",
    "init.own": "there is no ΔW to be started",
    "scale.constant": "there is no ΔW to be scaled",
    "combine.add": "there is no ΔW beside W0",
    "trainable.all": "there is no ΔW of which a part could stay frozen",
}
forbids = {
    "dropout": "there is no ΔW from whose input something could be dropped",
    "lora_bias": "there is no B: name the biases in adapter.train_also",
    **dict.fromkeys(("r", "rank_pattern"), "it has no rank"),
    "lifecycle.restart": "there is nothing that could be merged",
    **dict.fromkeys(
        ("target_modules", "exclude_modules", "layers"),
        "no module gets a ΔW: name those that train in adapter.train_also",
    ),
}


def make(place: Place) -> NoReturn:
    """Never called: the plan has no layers."""
    raise AssertionError("there is no delta")


def shapes(in_features: int, out_features: int, r: int) -> dict[str, tuple[int, ...]]:
    """It has no tensors."""
    return {}
