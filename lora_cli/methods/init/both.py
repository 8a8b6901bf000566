"""both: A and B random at once, each uniform in ±bound/√(its inputs), for deltas whose gates or vectors start at zero.

The start of TriLoRA (arXiv:2405.11236), of FLoRA's core (arXiv:2405.14739), of dynamic-rank DoRA (arXiv:2405.17357)
and, with bound √6, of AFLoRA (arXiv:2403.13269). In the first step only what stands beside A and B has a gradient.
"""

import math
from typing import Annotated

from pydantic import Field
from torch import nn

from lora_cli.adapter.delta import LowRank
from lora_cli.adapter.start import Start
from lora_cli.recipe.schema import Section

needs = {
    "delta.core or delta.gated or delta.scaled": "only beside something that is zero the model starts as the base"
}


class Settings(Section):
    """Settings in a recipe: `{both: {bound: 1}}`."""

    bound: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="Largest entry of A over 1/√in, and of B over 1/√r; 1 is that of LoRA's A."
    )


def init(delta: LowRank, start: Start, bound: float) -> None:
    """Draw A [r, in] and B [out, r], and close what stands beside them.

    An embedding's input is one-hot: A has one input a token, whatever `in` is.
    """
    delta.start(start.generator)
    for factor in (delta.A, delta.B):
        inputs = 1 if delta.reads_ids and factor is delta.A else factor.shape[1]
        limit = bound / math.sqrt(inputs)
        nn.init.uniform_(factor, -limit, limit, generator=start.generator)
