"""gaussian: A ~ N(0, 1/r²), B = 0, as the text of the LoRA paper. arXiv:2106.09685

The spread follows the common implementation, 1/r.
"""

from torch import nn

from lora_cli.adapter.delta import LowRank
from lora_cli.adapter.start import Start


def init(delta: LowRank, start: Start) -> None:
    """Fill A, zero B. For an embedding the other way round, as in `kaiming`."""
    r = delta.A.shape[0]
    drawn, zero = (delta.B, delta.A) if delta.reads_ids else (delta.A, delta.B)
    nn.init.normal_(drawn, std=1 / r, generator=start.generator)
    nn.init.zeros_(zero)
