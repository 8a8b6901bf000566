"""lowrank: ΔW = s·B·A with A [r, in] and B [out, r]. arXiv:2106.09685

The product of two thin matrices: r·(in + out) numbers instead of in·out. Most methods are this with another
start, scale or choice of what trains.
"""

from lora_cli.adapter.delta import LowRank

make = LowRank


def shapes(in_features: int, out_features: int, r: int) -> dict[str, tuple[int, ...]]:
    """The tensors that make up ΔW."""
    return {"A": (r, in_features), "B": (out_features, r)}
