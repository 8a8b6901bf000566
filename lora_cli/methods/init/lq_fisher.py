"""lq_fisher: lq where an error counts by what the loss feels of it. LQ-LoRA with Fisher weights, arXiv:2311.12023

A weight counts √F, F being its squared gradient over training rows, one row at a time. So that the best thin part is
still an SVD, √F is taken as a factor of the row times one of the column: the roots of F's means along them, as in the
authors' code. The thin part makes up for what matters most; quantising itself is nearest rounding, as everywhere.
"""

from typing import Annotated

from pydantic import Field

from lora_cli.adapter.delta import LowRank
from lora_cli.adapter.start import Start, as_lora, decompose, floored
from lora_cli.recipe.schema import Section

needs = {"base.quantized": "without it nothing is left to be made up for: see lora_ga"}
forbids = {"base.packed": "of weights in few bits there is no gradient"}
measures = "fisher"
shifts = True


class Settings(Section):
    """Settings in a recipe: `{lq_fisher: {iterations: 10, rows: 128}}`."""

    iterations: Annotated[int, Field(ge=1)] = Field(
        default=5, description="How often approximating and quantising take turns."
    )
    rows: Annotated[int, Field(ge=1)] = Field(default=32, description="Training rows of the gradients.")


def init(delta: LowRank, start: Start, iterations: int, rows: int) -> None:
    """A layer that is not quantised, as the embeddings, starts as LoRA does."""
    if start.quantised is None:
        as_lora(delta, start)
        return
    assert start.statistic is not None
    by_row, by_column = start.statistic.sqrt().split([delta.B.shape[0], delta.A.shape[1]])
    decompose(delta, start, iterations, floored(by_row)[:, None], floored(by_column))
