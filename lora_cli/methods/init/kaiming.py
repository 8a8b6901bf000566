"""kaiming: A ~ U(-1/√in, 1/√in), B = 0, as the LoRA authors' code. arXiv:2106.09685

The model starts as the base. The default; nothing to tune.
"""

from torch import nn

from lora_cli.adapter.delta import LowRank
from lora_cli.adapter.start import Start, uniform


def init(delta: LowRank, start: Start) -> None:
    """Fill A, zero B. For an embedding the authors zero A and draw B from N(0, 1): its input is one-hot."""
    if delta.reads_ids:
        nn.init.zeros_(delta.A)
        nn.init.normal_(delta.B, generator=start.generator)
        return
    uniform(delta.A, start.generator)
    nn.init.zeros_(delta.B)
