"""lq: W0 = Q + s·B·A, the thin part taken off first and the rest quantised, in turn. LQ-LoRA, arXiv:2311.12023

s·B·A of W0 − Q, then Q = q(W0 − s·B·A), beginning with Q = 0, which is QPiSSA. The best of these pairs is kept, which
need not be the last. Q goes with this adapter alone. `lq_fisher` is the same with errors weighted by the data.
"""

from typing import Annotated

from pydantic import Field

from lora_cli.adapter.delta import LowRank
from lora_cli.adapter.start import Start, as_lora, decompose
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
    decompose(delta, start, iterations)
