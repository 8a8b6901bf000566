"""Delta: ΔW. `LowRank` is the workhorse, ΔW = s·B·A. arXiv:2106.09685

Shapes: A is [r, in], B is [out, r]; x is [..., in] (or ids [...]), y is [..., out].
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from lora_cli.adapter.base import Base


class Delta(nn.Module, ABC):
    """What is added to W0."""

    mergeable = True
    """False where ΔW depends on x, so that no single matrix stands for it."""

    @abstractmethod
    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y + ΔW·x."""

    @abstractmethod
    def weight(self) -> Tensor:
        """ΔW in float32 [out, in], scale included."""

    def shift(self) -> Tensor | None:
        """What is added to the bias [out], scale included; None when nothing is."""
        return None

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(B', A') in float32 with B'·A' = ΔW exactly, or None when it is not of low rank."""
        return None


class LowRank(Delta):
    """ΔW·x = s·(B·(A·x) + b), never (B·A)·x: no tensor of W0's shape is made or saved for backward."""

    def __init__(self, base: Base, r: int, scale: float, dropout: nn.Module | None, bias: bool) -> None:
        """Zero factors of rank r, in float32 whatever the base is stored in: small steps would vanish in bf16."""
        super().__init__()
        self.A = nn.Parameter(torch.zeros(r, base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, r))
        self.bias = nn.Parameter(torch.zeros(base.out_features)) if bias else None
        self.scale = scale
        self.dropout = dropout
        self.project = base.project
        self.reads_ids = base.reads_ids

    def hidden(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A·x, [..., r]; the small matrix is cast to the large one's type, never the other way round."""
        if self.dropout is not None:
            x = self.dropout(x)
        return self.project(x, self.A.to(dtype if self.reads_ids else x.dtype))

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """One addmm: no temporary as wide as y, and the scale costs nothing."""
        z = self.hidden(x, y.dtype)
        if self.bias is not None:
            y = y + self.scale * self.bias.to(y.dtype)
        rows, z = y.reshape(-1, y.shape[-1]), z.reshape(-1, z.shape[-1])
        return torch.addmm(rows, z.to(y.dtype), self.B.to(y.dtype).t(), alpha=self.scale).view_as(y)

    def weight(self) -> Tensor:
        """s·B·A."""
        return self.scale * (self.B.detach().float() @ self.A.detach().float())

    def shift(self) -> Tensor | None:
        """s·b."""
        return None if self.bias is None else self.scale * self.bias.detach().float()

    def factors(self) -> tuple[Tensor, Tensor]:
        """(s·B, A)."""
        return self.scale * self.B.detach().float(), self.A.detach().float()
