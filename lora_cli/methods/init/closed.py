"""closed: A and B are random, ±1/√in and ±1/√r at most; what stands between them is zero. arXiv:2405.11236

The model starts as the base; in the first step only the middle has a gradient.
"""

import math

from torch import nn

from lora_cli.adapter.delta import LowRank
from lora_cli.adapter.start import Start

needs = {"delta.gated or delta.core": "without a middle of zero the model would not start as the base"}


def init(delta: LowRank, start: Start) -> None:
    """Kaiming-uniform, each by its own fan."""
    nn.init.kaiming_uniform_(delta.A, a=math.sqrt(5), generator=start.generator)
    nn.init.kaiming_uniform_(delta.B, a=math.sqrt(5), generator=start.generator)
    delta.start(start.generator)
