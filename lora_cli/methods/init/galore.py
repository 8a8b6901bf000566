"""galore: B = the r leading left singular vectors of the gradient, A = 0; for a B that stays. arXiv:2403.03507

Then A is the gradient's projection, and so are Adam's moments. The gradient is measured on the rows of the next step;
with `lifecycle: restart` anew at every restart.
"""

import torch
from torch import nn

from lora_cli.adapter.delta import LowRank
from lora_cli.adapter.start import Start

forbids = {"base.packed": "of weights in few bits there is no gradient"}
measures = "gradients"


def init(delta: LowRank, start: Start) -> None:
    """BᵀB = I."""
    assert start.statistic is not None
    U, _, _ = torch.linalg.svd(start.statistic.float(), full_matrices=False)
    r = min(delta.B.shape[1], U.shape[1])
    nn.init.zeros_(delta.B)
    delta.B[:, :r] = U[:, :r]
    nn.init.zeros_(delta.A)
