"""lq: W0 = Q + s·B·A, the thin part taken off first and the rest quantised, in turn. LQ-LoRA, arXiv:2311.12023

s·B·A of W0 − Q, then Q = q(W0 − s·B·A), beginning with Q = 0, which is QPiSSA. The best of these pairs is kept, which
need not be the last. Q goes with this adapter alone.
"""

from typing import Annotated

import torch
from pydantic import Field

from lora_cli.adapter.delta import LowRank
from lora_cli.adapter.start import Start, as_lora, thin
from lora_cli.recipe.schema import Section

needs = {"base.quantized": "without it nothing is left to be made up for: see pissa"}
forbids = {"base.packed": "what quantising took is not known any more"}
shifts = True


class Settings(Section):
    """Settings in a recipe: `{lq: {iterations: 10}}`."""

    iterations: Annotated[int, Field(ge=1)] = Field(
        default=5, description="How often approximating and quantising take turns."
    )


def init(delta: LowRank, start: Start, iterations: int) -> None:
    """A layer that is not quantised, as the embeddings, starts as LoRA does."""
    if start.quantised is None:
        as_lora(delta, start)
        return
    W0, smallest = start.base.weight(), float("inf")
    left = W0
    for _ in range(iterations):
        B, A = thin(left, delta.A.shape[0], delta.scale)
        left = W0 - start.quantised((-delta.scale * B, A))
        error = torch.linalg.norm(left - delta.scale * B @ A).item()
        if error < smallest:
            smallest = error
            delta.B.copy_(B)
            delta.A.copy_(A)
    delta.subtract_start()
