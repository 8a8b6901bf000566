"""Random numbers that follow from the recipe's seed and a name, so that there is no state to save."""

import hashlib

import torch


def number_of(seed: int, name: str) -> int:
    """56 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


def generator_of(seed: int, name: str) -> torch.Generator:
    """Always of the CPU, so that every device starts from the same numbers."""
    return torch.Generator().manual_seed(number_of(seed, name))
