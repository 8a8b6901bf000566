"""symmetric: both factors random, W = W0 − s·B0·A0 + s·B·A. kexue.fm/archives/9590

A and B learn from the first step on, both, which with a zero factor they do not. (A0, B0) is kept with the adapter, so
that it fits the original base: it is saved as LoRA of rank 2r.
"""

from typing import Annotated

from pydantic import Field

from lora_cli.adapter.delta import LowRank
from lora_cli.adapter.start import Start, uniform
from lora_cli.recipe.schema import Section

shifts = True


class Settings(Section):
    """Settings in a recipe: `{symmetric: {size: 0.05}}`."""

    size: Annotated[float, Field(gt=0)] = Field(
        default=0.05, description="Size of s·B0·A0 as a share of that of W0 (Frobenius norms)."
    )


def init(delta: LowRank, start: Start, size: float) -> None:
    """Draw both, bring their product to size, and subtract it."""
    uniform(delta.A, start.generator)
    uniform(delta.B, start.generator)
    ratio = size * start.base.weight().norm().to(delta.A.device) / delta.weight().norm()
    delta.A.mul_(ratio.sqrt())
    delta.B.mul_(ratio.sqrt())
    delta.subtract_start()
