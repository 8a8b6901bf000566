"""closed: A and B are random, ±1/√in and ±1/√r at most; what stands between them is zero. arXiv:2405.11236

The model starts as the base; in the first step only the middle has a gradient.
"""

from torch import nn

from lora_cli.adapter.delta import LowRank
from lora_cli.adapter.start import Start

needs = {"delta.gated or delta.core": "without a middle of zero the model would not start as the base"}


def init(delta: LowRank, start: Start) -> None:
    """Uniform, each by the number of its inputs; that of an embedding is one-hot, one a token."""
    delta.start(start.generator)
    for factor in (delta.A, delta.B):
        bound = 1.0 if delta.reads_ids and factor is delta.A else factor.shape[1] ** -0.5
        nn.init.uniform_(factor, -bound, bound, generator=start.generator)
