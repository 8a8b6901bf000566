"""pairs: reflections start in random pairs that undo each other. arXiv:2405.17484

So the model starts as the base, and none of them is where it could not learn.
"""

import torch

from lora_cli.adapter.delta import Delta
from lora_cli.adapter.start import Start, uniform

needs = {"delta.hra": "the others have no reflections"}


def init(delta: Delta, start: Start) -> None:
    """Each row of U twice, from U(-1/√in, 1/√in)."""
    U = delta.get_parameter("U")
    drawn = torch.empty(U.shape[0] // 2, U.shape[1])
    uniform(drawn, start.generator)
    U.copy_(drawn.repeat_interleave(2, 0))
