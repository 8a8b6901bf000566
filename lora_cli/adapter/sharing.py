"""Which layers have a tensor in common."""

from typing import Literal

Share = Literal["type", "shape", "all"]
"""type: layers whose names have the same ending, as all q_proj; shape: of the same size; all: every adapted layer."""


def named(key: str, share: Share, layer: str, in_features: int, out_features: int) -> str:
    """What the tensor `key` of a layer is called among those that are shared: its group's name and its own."""
    groups = {"type": f"{layer.rpartition('.')[2]}.", "shape": f"{out_features}x{in_features}.", "all": ""}
    return f"{groups[share]}{key}"
