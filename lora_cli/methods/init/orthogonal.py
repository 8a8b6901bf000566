"""orthogonal: the rows of A are orthonormal, B = 0; the A of asymmetric LoRA. arXiv:2402.16842

No two of the r directions overlap at the start, which matters most when A stays frozen (`trainable: lora_fa`).
"""

import torch
from torch import nn

from lora_cli.adapter.delta import LowRank


def init(delta: LowRank, generator: torch.Generator) -> None:
    """Fill A from the QR of a Gaussian, zero B; A·Aᵀ = I when r ≤ in, else Aᵀ·A = I."""
    nn.init.orthogonal_(delta.A, generator=generator)
    nn.init.zeros_(delta.B)
