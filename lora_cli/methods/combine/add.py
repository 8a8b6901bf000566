"""add: W = W0 + ΔW. arXiv:2106.09685

What everything else is measured against: one thin product more than the plain layer.
"""

from lora_cli.adapter.layer import Adapted

make = Adapted


def shapes(out_features: int) -> dict[str, tuple[int, ...]]:
    """It has no tensors of its own."""
    return {}
