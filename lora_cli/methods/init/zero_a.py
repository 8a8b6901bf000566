"""zero_a: A = 0, B ~ U(-1/√r, 1/√r), called Init[B]. arXiv:2406.08447

The model starts as the base, and the first step moves A instead of B. The paper finds the default (B = 0) better,
because it stands larger learning rates.
"""

from torch import nn

from lora_cli.adapter.delta import LowRank
from lora_cli.adapter.start import Start, uniform


def init(delta: LowRank, start: Start) -> None:
    """Zero A, fill B."""
    nn.init.zeros_(delta.A)
    uniform(delta.B, start.generator)
