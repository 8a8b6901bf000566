"""lora_fa: A stays at its first value, B trains. arXiv:2308.03303

Backward then needs A·x (r numbers a token) instead of x (in numbers a token): less memory for activations.
"""

forbids = {"init.zero_a": "A would stay zero for ever, and with it ΔW: choose an init that draws A"}


def trains(name: str) -> bool:
    """Everything but A."""
    return name != "A"
