"""From timings to ratios: who runs when, which runs are a pair, and what a set of ratios says."""

from collections.abc import Sequence
from statistics import median
from typing import Any

OURS = "ours"
DRIFT = 0.05
"""Two runs are no pair when the machine's own speed before them differs by more."""


def order(against: Sequence[str], rounds: int) -> list[list[str]]:
    """The systems of each round, ours beside one or between two others; every second round is reversed.

    With one other system that is ABBA: what drifts slowly, such as the clock of a warm processor, cancels out.
    No round without others.
    """
    if not against:
        return []
    forth = [*against[:1], OURS, *against[1:]]
    return [forth if number % 2 == 0 else forth[::-1] for number in range(rounds)]


def speed(result: dict[str, Any], timed: int) -> float:
    """Tokens per second, padding not counted, over the timed steps."""
    return sum(result["real_tokens"][-timed:]) / sum(result["step_s"][-timed:])


def cpu_speed(result: dict[str, Any], timed: int) -> float:
    """Tokens per second of CPU time: steadier where others use the machine too."""
    return sum(result["real_tokens"][-timed:]) / sum(result["step_cpu_s"][-timed:])


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and extremes."""
    return {"median": median(values), "min": min(values), "max": max(values), "count": len(values)}


def is_steady(pair: tuple[dict[str, Any], dict[str, Any]]) -> bool:
    """Whether the machine was as fast before the one as before the other."""
    return relative(pair[0]["probe"], pair[1]["probe"]) <= DRIFT


def compared(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], timed: int) -> dict[str, Any]:
    """Pairs of results (ours, theirs) -> ratios ours / theirs, a summary of each kind.

    Above 1 is better for speed; below 1 for peak memory and for the time to the first step.
    """
    kinds = {
        "speed": [speed(ours, timed) / speed(theirs, timed) for ours, theirs in pairs],
        "cpu_speed": [cpu_speed(ours, timed) / cpu_speed(theirs, timed) for ours, theirs in pairs],
        **{
            key: [ours[key] / theirs[key] for ours, theirs in pairs]
            for key in ("peak_rss_bytes", "first_step_s")
        },
    }
    return {kind: summary(values) for kind, values in kinds.items()}


def relative(ours: float, theirs: float) -> float:
    """|ours − theirs| / |theirs|."""
    return abs(ours - theirs) / abs(theirs)
