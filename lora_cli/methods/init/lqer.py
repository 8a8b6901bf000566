"""lqer: s·B·A starts as the best thin approximation, as inputs see it, of what quantising takes. arXiv:2402.02446

E = W0 − q(W0) is scaled by the size of each input on training rows (L²QER), so that what the inputs use is made up
for first. The base is q(W0), the same that any other adapter has.
"""

from typing import Annotated

from pydantic import Field

from lora_cli.adapter.delta import LowRank
from lora_cli.adapter.start import Start, as_lora, floored, thin
from lora_cli.recipe.schema import Section

needs = {"base.quantized": "it starts as what quantising takes"}
forbids = {
    "base.packed": "what quantising took is not known any more",
    "base.convolution": "its inputs are pictures, not tokens",
    "base.embedding": "its inputs are token ids, which have no size",
}
measures = "inputs"
approximates = True
shifts = True


class Settings(Section):
    """Settings in a recipe: `{lqer: {rows: 32}}`."""

    rows: Annotated[int, Field(ge=1)] = Field(default=32, description="Training rows that are looked at.")


def init(delta: LowRank, start: Start, rows: int) -> None:
    """s·B·A·S = SVD_r(E·S), S = √E[x²] on the diagonal; a layer that is not quantised starts as LoRA does."""
    if start.quantised is None:
        as_lora(delta, start)
        return
    assert start.statistic is not None
    size = floored(start.statistic.diagonal().float().clamp(min=0).sqrt())
    error = start.base.weight() - start.quantised(None)
    B, A = thin(error, delta.A.shape[0], delta.scale, columns=size)
    delta.B.copy_(B)
    delta.A.copy_(A)
