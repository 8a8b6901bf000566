"""milora: s·B·A starts as the part of W0 with the r smallest singular values; the rest stays frozen. arXiv:2406.09044

The opposite of `pissa`: what matters most in W0 is left alone, and the least important directions learn the new task.
"""

import torch

from lora_cli.adapter.delta import LowRank
from lora_cli.adapter.start import Start

shifts = True


def init(delta: LowRank, start: Start) -> None:
    """B = U·√(Σ/s), A = √(Σ/s)·Vᵀ of the r smallest singular values."""
    U, S, Vt = torch.linalg.svd(start.base.weight(), full_matrices=False)
    r = min(delta.A.shape[0], len(S))
    root = (S[-r:] / delta.scale).sqrt()
    delta.B[:, :r] = U[:, -r:] * root
    delta.A[:r] = root[:, None] * Vt[-r:]
    delta.subtract_start()
