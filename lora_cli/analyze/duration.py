"""How long work takes on a device: its products, attention, moving bytes, and starting all that."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from lora_cli.analyze.devices import Device
from lora_cli.analyze.rehearse import Rows
from lora_cli.analyze.tally import Work
from lora_cli.analyze.tape import Cost


@dataclass(frozen=True)
class Rates:
    """What one micro-batch showed: how much each token, each learned token and each pair of tokens costs."""

    token: Work
    learned: Work
    pair: Work
    batch: Work
    """Of each micro-batch, whatever is in it."""

    @classmethod
    def of(cls, cost: Cost, rows: Rows) -> "Rates":
        """All but attention, the head and launches grows with tokens."""
        blocks, head = cost.work["blocks"], cost.work["head"]
        return cls(
            token=Work(products=blocks.products, moved=blocks.moved) * (1 / rows.cells),
            learned=Work(products=head.products, moved=head.moved) * (1 / rows.trained),
            pair=Work(attention=blocks.attention) * (1 / rows.pairs),
            batch=Work(launches=blocks.launches + head.launches),
        )

    def work(self, rows: Rows) -> Work:
        """Of another micro-batch, exact but for rounding."""
        return self.token * rows.cells + self.learned * rows.trained + self.pair * rows.pairs + self.batch


def seconds(work: Work, device: Device, dtype: str, skipped: float = 1.0) -> float:
    """Of work on one device.

    Args:
        work: to be done.
        device: that does it.
        dtype: of the products.
        skipped: how many times the causal pairs attention computes, see `computed_pairs`.
    """
    computing = (
        work.products / device.rate(dtype)
        + skipped * work.attention / device.attention
        + work.moved / device.bandwidth
    )
    starting = work.launches * device.launch
    return max(computing, starting) if device.overlaps else computing + starting


def computed_pairs(device: Device, lengths: Sequence[int]) -> float:
    """How many times the causal half of all pairs a kernel computes that skips whole blocks only."""
    computed = sum(_pairs(length, device.query_block, device.key_block) for length in lengths)
    return computed / sum(length**2 / 2 for length in lengths)


@cache
def _pairs(length: int, query_block: int, key_block: int) -> int:
    total = 0
    for start in range(0, length, query_block):
        end = min(start + query_block, length)
        total += (end - start) * min(length, -(-end // key_block) * key_block)
    return total
