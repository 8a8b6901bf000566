"""kaiming: A ~ U(-1/√in, 1/√in), B = 0, as the LoRA authors' code. arXiv:2106.09685

The model starts as the base. The default; nothing to tune. Of an embedding A is zero and B random.
"""

from lora_cli.adapter.delta import LowRank
from lora_cli.adapter.start import Start, as_lora


def init(delta: LowRank, start: Start) -> None:
    """As LoRA does."""
    as_lora(delta, start)
