"""own: the start that the delta's file gives it, at which ΔW = 0 unless that file says otherwise.

For the deltas whose file says so, which are no plain product of A and B.
"""

from lora_cli.adapter.delta import Delta
from lora_cli.adapter.start import Start

forbids = {"delta.lowrank": "A and B would both be zero, from where no step leads"}


def init(delta: Delta, start: Start) -> None:
    """The delta knows."""
    delta.start(start.generator)
