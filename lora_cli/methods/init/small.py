"""small: A, B ~ N(0, 0.02²), the start of AdaLoRA, whose gates are closed. arXiv:2303.10512

The model starts as the base because every gate E is zero.
"""

from typing import Annotated

from pydantic import Field
from torch import nn

from lora_cli.adapter.delta import LowRank
from lora_cli.adapter.start import Start
from lora_cli.recipe.schema import Section

needs = {"delta.gated": "without closed gates the model would not start as the base"}


class Settings(Section):
    """Settings in a recipe: `{small: {std: 0.02}}`."""

    std: Annotated[float, Field(gt=0)] = Field(default=0.02, description="Spread of the entries of A and B.")


def init(delta: LowRank, start: Start, std: float) -> None:
    """Draw A and B, close the gates."""
    nn.init.normal_(delta.A, std=std, generator=start.generator)
    nn.init.normal_(delta.B, std=std, generator=start.generator)
    nn.init.zeros_(delta.get_parameter("E"))
