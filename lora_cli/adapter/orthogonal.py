"""Orthogonal matrices R near the identity, and deltas that turn the input of W0 with one."""

from abc import abstractmethod

import torch
from torch import Tensor

from lora_cli.adapter.base import Base
from lora_cli.adapter.delta import Delta, Place


def cayley(entries: Tensor, size: int) -> Tensor:
    """R − I = −2·Q·(I + Q)⁻¹ of the skew-symmetric Q with `entries` above its diagonal; R = (I − Q)·(I + Q)⁻¹.

    The difference, not R: what R changes would be lost in the rounding of numbers near 1.

    Args:
        entries: [..., size·(size − 1)/2], row by row.
        size: rows of Q.

    Returns:
        [..., size, size], float32.
    """
    rows, columns = torch.triu_indices(size, size, 1, device=entries.device)
    Q = entries.new_zeros((*entries.shape[:-1], size, size))
    Q[..., rows, columns] = entries
    Q = Q - Q.mT
    identity = torch.eye(size, dtype=Q.dtype, device=Q.device)
    # Q commutes with (I + Q)⁻¹, so that it may stand on either side.
    return -2 * torch.linalg.solve(identity + Q, Q)


class Turned(Delta):
    """ΔW = s·W0·(R − I): with s = 1, W0 sees R·x, and what the rows of W0 are to one another stays as it is."""

    def __init__(self, place: Place) -> None:
        """A subclass has the tensors of R."""
        super().__init__(place.dropout)
        self.base, self.scale = place.base, place.scale

    @abstractmethod
    def moved(self, x: Tensor) -> Tensor:
        """(R − I)·x [..., in]."""

    def beside(self, base: Base, x: Tensor, dropped: Tensor) -> Tensor:
        """Return W0·(x + s·(R − I)·dropped) + b0: one product with W0."""
        return base.module(x + (self.scale * self.moved(dropped)).to(x.dtype))

    def add_dropped(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y + s·W0·(R − I)·x."""
        return y + self.scale * self.base.times(self.moved(x).to(x.dtype)).to(y.dtype)

    @torch.no_grad()
    def turn(self) -> Tensor:
        """R − I in float32 [in, in]."""
        like = next(self.parameters())
        return self.moved(torch.eye(self.base.in_features, dtype=like.dtype, device=like.device)).t()

    def weight(self) -> Tensor:
        """s·W0·(R − I)."""
        return self.scale * self.base.weight() @ self.turn()
