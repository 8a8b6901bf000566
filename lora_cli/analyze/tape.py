"""What a micro-batch did, phase by phase: played for more blocks than were rehearsed, and for more documents."""

from collections.abc import Sequence
from dataclasses import dataclass

from lora_cli.analyze.tally import Phase, Work


@dataclass(frozen=True)
class Cost:
    """Of one micro-batch."""

    kept: int
    """Bytes of activations that wait for the backward pass."""
    peak: int
    """Bytes at the highest point, without what is held."""
    work: dict[str, Work]
    """Stage (blocks, head) -> what is computed."""
    forward: Work
    """Of it what leads to what the head reads, once."""


@dataclass(frozen=True)
class Tape:
    """A micro-batch through some blocks, phase by phase: what is needed to know it through more that are alike."""

    before: Phase
    """Embeddings, masks, positions."""
    forward: Sequence[Phase]
    """Of each block, from the bottom."""
    norm: Phase
    """Between the blocks and the head."""
    head: Phase
    """With the loss."""
    turn: Phase
    """Back from the loss to the blocks."""
    backward: Sequence[Phase]
    """Of each block, from the top, as far down as something trains."""

    @classmethod
    def of(cls, phases: Sequence[Phase], blocks: int) -> "Tape":
        """Put phases that followed one another in their places.

        Raises:
            ValueError: the model does not go through its blocks one after the other, and then through its head.
        """
        if not blocks + 4 <= len(phases) <= 2 * blocks + 4:
            raise ValueError("its blocks do not follow one another")
        norm, head, turn, *backward = phases[blocks + 1 :]
        return cls(phases[0], phases[1 : blocks + 1], norm, head, turn, backward)

    def played(self, order: Sequence[int], again: int = 0, backward: float = 1.0, most: float = 1.0) -> Cost:
        """What it costs to go through blocks that are like these of the tape, from the bottom.

        Args:
            order: the blocks.
            again: forward passes more, whose blocks keep nothing.
            backward: share of the backward pass of the blocks that is computed, on average.
            most: at the time when memory is highest.
        """
        below = dict(zip(reversed(range(len(self.forward))), self.backward, strict=False))
        ahead = [self.before, *(self.forward[index] for index in order), self.norm, self.head]
        back = [self.turn, *(below[index] for index in reversed(order) if index in below)]
        of_blocks = range(1, len(order) + 1), range(len(ahead) + 1, len(ahead) + len(back))
        live = kept = peak = 0
        for number, phase in enumerate((*ahead, *back)):
            kept = live if number == len(ahead) else kept
            peak = max(peak, live + phase.high)
            live += round(phase.left * most) if any(number in each for each in of_blocks) else phase.left
        head = self.head.work + Work(products=self.turn.work.products)
        forward = _work(ahead[:-1])
        every = forward * (1 + again) + _work([self.head, self.turn]) + _work(back[1:]) * backward
        return Cost(kept, peak, {"blocks": every - head, "head": head}, forward)


def _work(phases: Sequence[Phase]) -> Work:
    return sum((phase.work for phase in phases), Work())


def cut(tokens: int) -> tuple[int, int]:
    """A row of tokens as two documents."""
    return tokens // 2, tokens - tokens // 2


def apart(one: Phase, two: Phase, lengths: Sequence[int]) -> Phase:
    """A phase over packed documents that attend each by itself, from two over their row: uncut, and as `cut` cuts it.

    Each document adds as many launches as the second of the two, and attention goes by Σ length².
    """
    tokens, more = sum(lengths), two.work - one.work
    less = (_squares(lengths) - tokens**2) / (_squares(cut(tokens)) - tokens**2)
    added = Work(attention=more.attention * less, launches=more.launches * (len(lengths) - 1))
    return Phase(two.high, two.left, one.work + added)


def _squares(lengths: Sequence[int]) -> int:
    """Where there is nothing before a token, attention is not causal, and counts twice."""
    return sum(length**2 if length > 1 else 2 for length in lengths)
