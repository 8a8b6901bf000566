"""routed: every expert starts as LoRA does, A random and B zero, beside a random router.

The model starts as the base. A router of zeros would give all experts the same gradient for ever.
"""

from lora_cli.adapter.routed import Routed
from lora_cli.adapter.start import Start

forbids = {
    "a mergeable delta": "it has no router that could be drawn",
    "trainable.only_a": "B would stay zero for ever, and with it ΔW",
}


def init(delta: Routed, start: Start) -> None:
    """The delta knows what it is made of."""
    delta.draw(start.generator)
