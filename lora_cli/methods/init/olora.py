"""olora: B is the first r columns of Q, A the first r rows of R, of W0 = Q·R. arXiv:2406.01775

An orthonormal B that costs a QR instead of an SVD. Saved as LoRA of rank 2r, which fits the original base.
"""

import torch

from lora_cli.adapter.delta import LowRank
from lora_cli.adapter.start import Start

shifts = True


def init(delta: LowRank, start: Start) -> None:
    """BᵀB = I; A is upper-trapezoidal. s·B·A is subtracted."""
    Q, R = torch.linalg.qr(start.base.weight())
    r = min(delta.A.shape[0], Q.shape[1])
    delta.B[:, :r] = Q[:, :r]
    delta.A[:r] = R[:r]
    delta.subtract_start()
