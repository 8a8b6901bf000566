"""lora_fa: A stays at its first value, B trains. arXiv:2308.03303

Backward then needs A·x (r numbers a token) instead of x (in numbers a token): less memory for activations.
"""

forbids = {
    **{
        f"init.{name}": "A would stay zero for ever, and with it ΔW: choose an init that draws A"
        for name in ("zero_a", "galore")
    },
    "base.embedding": "there A is the factor that starts at zero, and no input of it is kept that could be saved",
    "delta.miss": "it has no A",
    "delta.vera": "its A is frozen anyway",
}


def trains(name: str) -> bool:
    """Everything but A."""
    return name != "A"
