"""Deltas that live on the singular vectors of W0 = U·diag(σ)·Vᵀ."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from lora_cli.adapter.base import Base
from lora_cli.adapter.delta import Delta, Place


def decomposed(base: Base) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, n], σ [n], Vᵀ [n, in] of W0 with n = min(out, in), float32.

    Found in float64: vectors whose singular values are close differ with every rounding, and here they have to come
    out the same whenever an adapter is loaded.
    """
    U, S, Vt = torch.linalg.svd(base.weight().double(), full_matrices=False)
    return U.float(), S.float(), Vt.float()


class Spectrum(Delta):
    """ΔW = s·U·diag(c(σ, d))·Vᵀ: all singular values move, by d [n], and no singular vector does.

    Only d is kept in files. U and V are taken from W0 when the adapter is put on it, and are as large as W0.
    """

    compact = True
    U: Tensor
    S: Tensor
    Vt: Tensor

    def __init__(self, place: Place) -> None:
        """Nothing is decomposed before `start`."""
        super().__init__(place.dropout)
        self.base, self.scale = place.base, place.scale
        size = min(place.base.out_features, place.base.in_features)
        self.d = nn.Parameter(torch.zeros(size))
        self.register_buffer("U", torch.zeros(place.base.out_features, size), persistent=False)
        self.register_buffer("S", torch.zeros(size), persistent=False)
        self.register_buffer("Vt", torch.zeros(size, place.base.in_features), persistent=False)

    def start(self, generator: torch.Generator) -> None:
        """Decompose W0; d = 0."""
        with torch.no_grad():
            for kept, found in zip((self.U, self.S, self.Vt), decomposed(self.base), strict=True):
                kept.copy_(found)
        nn.init.zeros_(self.d)

    @abstractmethod
    def change(self) -> Tensor:
        """What is added to each σ [n]."""

    def _change(self) -> Tensor:
        """The same without the directions of σ = 0: which these are is up to rounding."""
        smallest = max(self.U.shape[0], self.Vt.shape[1]) * torch.finfo(torch.float32).eps * self.S[0]
        return self.change() * (smallest < self.S)

    def add_dropped(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y + s·U·(c ⊙ (Vᵀ·x))."""
        z = self.base.project(x, self.Vt.to(y.dtype if self.base.reads_ids else x.dtype))
        z = (z * self._change()).to(y.dtype)
        rows, z = y.reshape(-1, y.shape[-1]), z.reshape(-1, z.shape[-1])
        return torch.addmm(rows, z, self.U.to(y.dtype).t(), alpha=self.scale).view_as(y)

    def weight(self) -> Tensor:
        """The product of the factors."""
        B, A = self.factors()
        return B @ A

    def factors(self) -> tuple[Tensor, Tensor]:
        """(s·U·diag(c), Vᵀ), of full rank."""
        return self.scale * self.U * self._change().detach(), self.Vt
