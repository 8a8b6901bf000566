"""Random numbers that follow from the recipe's seed and a name, so that there is no state to save."""

import hashlib

import torch


def generator_of(seed: int, name: str) -> torch.Generator:
    """Always of the CPU, so that every device starts from the same numbers."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
