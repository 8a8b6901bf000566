"""constant: s is what is written here, 1 unless said otherwise; neither alpha nor r has a part in it.

For deltas that are no product of A and B, where nothing grows with r.
"""

from typing import Annotated

from pydantic import Field

from lora_cli.recipe.schema import Section

forbids = {
    **dict.fromkeys(
        ("alpha", "alpha_pattern"), "the method has a scale of its own, on which it would have no effect"
    ),
}


class Settings(Section):
    """Settings in a recipe: `{constant: {value: 1.0}}`."""

    value: Annotated[float, Field(gt=0)] = Field(default=1.0, description="s.")


def scale(alpha: float, r: int, value: float) -> float:
    """`value`."""
    return value
