"""standard: each input of A is dropped with probability p, the rest scaled by 1 / (1 - p). arXiv:2106.09685"""

from typing import Annotated

from pydantic import Field
from torch import nn

from lora_cli.recipe.schema import Section


class Settings(Section):
    """Settings in a recipe: `{standard: {p: 0.05}}`, or 0.05 for short."""

    p: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="Probability of being dropped.")


def make(p: float) -> nn.Module | None:
    """nn.Dropout, or None at p = 0, so that the hot path has nothing to call."""
    return nn.Dropout(p) if p else None
