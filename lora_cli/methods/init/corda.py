"""corda: pissa or milora in the geometry of the layer's inputs. arXiv:2406.05223

C = E[x·xᵀ] on rows of the training data, W0·C = U·Σ·Vᵀ, and W0 = U·Σ·(VᵀC⁻¹). `mode: ipm` trains the r largest
components, what the inputs use most, for a new task; `kpm` the r smallest, which keeps what the model knows.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from lora_cli.adapter.delta import LowRank
from lora_cli.adapter.start import Start
from lora_cli.recipe.schema import Section

forbids = {
    "base.embedding": "its inputs are token ids, of which there is no covariance",
    "base.convolution": "the covariance of its patches is not measured",
}
measures = "inputs"
shifts = True


class Settings(Section):
    """Settings in a recipe: `{corda: {mode: kpm, rows: 256}}`."""

    mode: Literal["ipm", "kpm"] = Field(
        default="ipm", description="ipm: train what the inputs use most; kpm: what they use least."
    )
    rows: Annotated[int, Field(ge=1)] = Field(default=256, description="Training rows that are looked at.")


def init(delta: LowRank, start: Start, mode: str, rows: int) -> None:
    """B = U·√(Σ/s), A = √(Σ/s)·VᵀC⁻¹ of r components; they are subtracted."""
    assert start.statistic is not None
    C, inverse = _damped(start.statistic.double())
    U, S, Vt = torch.linalg.svd(start.base.weight().double() @ C, full_matrices=False)
    r = min(delta.A.shape[0], len(S))
    chosen = slice(0, r) if mode == "ipm" else slice(len(S) - r, len(S))
    root = (S[chosen] / delta.scale).sqrt()
    delta.B[:, :r] = (U[:, chosen] * root).float()
    delta.A[:r] = (root[:, None] * (Vt[chosen] @ inverse)).float()
    delta.subtract_start()


def _damped(C: Tensor) -> tuple[Tensor, Tensor]:
    """C and its inverse, with as little added to the diagonal as makes one the inverse of the other in float32.

    Where nothing at all was measured, C becomes the identity.
    """
    identity = torch.eye(len(C), dtype=C.dtype, device=C.device)
    damping = 0.01 * C.diagonal().mean().item() or 1.0
    while True:
        inverse, singular = torch.linalg.inv_ex(C.float())
        if not singular and torch.dist(C.float() @ inverse, identity.float()) < 0.05:  # the authors' bound
            return C, torch.linalg.inv(C)
        C, damping = C + damping * identity, 2 * damping
