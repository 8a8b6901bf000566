"""closed: A and B are random, ±1/√in and ±1/√r at most; what stands between them is zero. arXiv:2405.11236

The model starts as the base; in the first step only the middle has a gradient.
"""

from torch import nn

from lora_cli.adapter.delta import LowRank
from lora_cli.adapter.start import Start, uniform

needs = {"delta.gated or delta.core": "without a middle of zero the model would not start as the base"}


def init(delta: LowRank, start: Start) -> None:
    """Uniform, each by the number of its inputs; that of an embedding is one-hot, one a token."""
    delta.start(start.generator)
    if delta.reads_ids:
        nn.init.uniform_(delta.A, -1.0, 1.0, generator=start.generator)
    else:
        uniform(delta.A, start.generator)
    uniform(delta.B, start.generator)
