"""How much arithmetic a token needs: the physical limit that the speeds are measured against."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Of a model with its adapter."""

    frozen: int
    """Weights of the frozen linears in the blocks."""
    head: int
    """hidden x vocabulary."""
    lora: int
    """Weights of A and B."""
    attention: int
    """Layers x heads x width of a head."""


def per_token(sizes: Sizes, labelled: float, attended: float) -> float:
    """Floating-point operations of forward and backward per token, nothing computed twice and nothing skipped.

    A product with a frozen weight W costs 2 for x·Wᵀ and 2 for dX, none for dW; A and B need theirs too, so 6.
    Causal attention: scores and values over half of the row, 2·s; backward 2.5 times that, as flash attention does.

    Args:
        sizes: of the model.
        labelled: share of the tokens that the head scores.
        attended: mean over tokens of the length of their row.
    """
    return (
        4 * sizes.frozen + 4 * sizes.head * labelled + 6 * sizes.lora + 3.5 * 2 * attended * sizes.attention
    )
