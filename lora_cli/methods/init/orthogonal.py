"""orthogonal: the rows of A are orthonormal, B = 0; the A of asymmetric LoRA. arXiv:2402.16842

No two of the r directions overlap at the start, which matters most when A stays frozen (`trainable: lora_fa`).
"""

from torch import nn

from lora_cli.adapter.delta import LowRank
from lora_cli.adapter.start import Start


def init(delta: LowRank, start: Start) -> None:
    """Fill A from the QR of a Gaussian, zero B; A·Aᵀ = I when r ≤ in, else Aᵀ·A = I."""
    nn.init.orthogonal_(delta.A, generator=start.generator)
    nn.init.zeros_(delta.B)
