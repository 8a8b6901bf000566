"""lora_ga: A and B start along the gradient of full fine-tuning; the first step is one like it. arXiv:2407.05000

G = U·S·Vᵀ on training rows; A takes the r leading right singular vectors, B the next r left ones. What they add is
subtracted; saved as LoRA of rank 2r, which fits the original base.
"""

from typing import Annotated

import torch
from pydantic import Field

from lora_cli.adapter.delta import LowRank
from lora_cli.adapter.start import Start
from lora_cli.recipe.schema import Section

forbids = {"base.packed": "of weights in few bits there is no gradient"}
measures = "gradients"
shifts = True


class Settings(Section):
    """Settings in a recipe: `{lora_ga: {rows: 64, gamma: 16}}`."""

    rows: Annotated[int, Field(ge=1)] = Field(default=64, description="Training rows of the gradient.")
    gamma: Annotated[float, Field(gt=0)] = Field(
        default=16.0, description="The larger, the smaller A and B start: both are scaled by out^¼ / √gamma."
    )


def init(delta: LowRank, start: Start, rows: int, gamma: float) -> None:
    """A = V[:r]ᵀ, B = U[r:2r], or the last r where there are no 2r, scaled; they are subtracted."""
    assert start.statistic is not None
    r = delta.A.shape[0]
    U, _, Vt = torch.linalg.svd(start.statistic.float(), full_matrices=False)
    size = delta.B.shape[0] ** 0.25 / gamma**0.5
    first = max(min(r, U.shape[1] - r), 0)
    left = U[:, first : first + r]
    delta.A[: len(Vt[:r])] = Vt[:r] * size
    delta.B[:, : left.shape[1]] = left * size
    delta.subtract_start()
