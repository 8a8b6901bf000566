"""only_a: B stays at its first value, A trains; the other half of `lora_fa`. arXiv:2403.03507

With B the leading left singular vectors of the gradient, drawn anew now and then, this is GaLore.
"""

forbids = {
    **{
        f"init.{name}": "B would stay zero for ever, and with it ΔW: choose an init that fills B"
        for name in ("kaiming", "gaussian", "orthogonal", "eva", "random_projection")
    },
    "delta.miss": "it has no A, so nothing would train",
    "delta.vera": "its B is frozen anyway",
}


def trains(name: str) -> bool:
    """Everything but B."""
    return name != "B"
