"""spectral: ΔW = s·((U + B)·Σ·(V + A) − U·Σ·V), a change of the r leading singular vectors of W0. arXiv:2405.13952

U [out, r] and V [r, in] are the vectors, frozen, B and A what is added to them, zero at first: a legal start, because
the products with Σ·V and U·Σ have gradients there. Saved as LoRA of rank 2r.
"""

import torch
from torch import Tensor, nn

from lora_cli.adapter.delta import Factored, Place
from lora_cli.adapter.spectrum import decomposed

needs = {"init.own": "it starts at zero"}
forbids = {"lora_bias": "there are two products to add it to"}


class Spectral(Factored):
    """B, A, and the r leading singular vectors and values."""

    def __init__(self, place: Place) -> None:
        """Nothing is decomposed before `start`."""
        super().__init__(place)
        self.base = place.base
        sizes = shapes(place.base.in_features, place.base.out_features, place.r)
        tensors = {key: nn.Parameter(torch.zeros(size), key not in FROZEN) for key, size in sizes.items()}
        self.A, self.B, self.U, self.V, self.S = (tensors[key] for key in ("A", "B", "U", "V", "S"))

    def start(self, generator: torch.Generator) -> None:
        """U, Σ and V from W0; where it has fewer than r, the others stay zero."""
        U, S, Vt = decomposed(self.base)
        r = min(len(self.S), len(S))
        with torch.no_grad():
            for tensor in self.parameters():
                tensor.zero_()
            self.U[:, :r].copy_(U[:, :r])
            self.S[:r].copy_(S[:r])
            self.V[:r].copy_(Vt[:r])

    def up(self) -> Tensor:
        """[B·Σ, (U + B)·Σ]."""
        return torch.cat([self.B * self.S, (self.U + self.B) * self.S], 1)

    def down(self) -> Tensor:
        """[V; A]."""
        return torch.cat([self.V, self.A], 0)


make = Spectral


def shapes(in_features: int, out_features: int, r: int) -> dict[str, tuple[int, ...]]:
    """The tensors that make up ΔW; U, V and S never train."""
    thin = {"A": (r, in_features), "B": (out_features, r)}
    return thin | {"U": (out_features, r), "V": (r, in_features), "S": (r,)}


FROZEN = frozenset({"U", "V", "S"})
