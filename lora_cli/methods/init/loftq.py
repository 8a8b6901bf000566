"""loftq: s·B·A starts as the best thin approximation of what quantising takes. arXiv:2310.08659

In turn, T times: Q = q(W0 − s·B·A), then s·B·A of W0 − Q. The best of these pairs is kept, which need not be the last.
With one iteration Q = q(W0), the base that any other adapter has; with more, Q goes with this adapter alone.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from lora_cli.adapter.delta import LowRank
from lora_cli.adapter.start import Start, as_lora, thin
from lora_cli.recipe.schema import Section

needs = {"base.quantized": "it starts as what quantising takes"}
forbids = {"base.packed": "what quantising took is not known any more"}
approximates = True
shifts = True


class Settings(Section):
    """Settings in a recipe: `{loftq: {iterations: 5}}`."""

    iterations: Annotated[int, Field(ge=1)] = Field(
        default=1, description="How often quantising and approximating take turns; the paper has 1 to 5."
    )


def init(delta: LowRank, start: Start, iterations: int) -> None:
    """A layer that is not quantised, as the embeddings, starts as LoRA does."""
    if start.quantised is None:
        as_lora(delta, start)
        return
    W0, smallest = start.base.weight(), float("inf")
    taken: tuple[Tensor, Tensor] | None = None
    best = taken
    for _ in range(iterations):
        left = W0 - start.quantised(taken)
        B, A = thin(left, delta.A.shape[0], delta.scale)
        error = torch.linalg.norm(left - delta.scale * B @ A).item()
        if error < smallest:
            smallest, best = error, taken
            delta.B.copy_(B)
            delta.A.copy_(A)
        taken = -delta.scale * B, A
    if best is not None:
        delta.fix(*best)
