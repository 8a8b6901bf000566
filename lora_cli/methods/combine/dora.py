"""dora: W = m ⊙ (W0 + ΔW) / ‖W0 + ΔW‖, a trained length m for every row of W. arXiv:2402.09353

Length and direction train apart, as they do in full fine-tuning. Reaches at half the rank what LoRA reaches; a step
costs more. Take a learning rate slightly below LoRA's.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_cli.adapter.base import Base
from lora_cli.adapter.delta import Delta
from lora_cli.adapter.layer import Adapted

forbids = {
    "base.embedding": "its rows are tokens, and a length for each dimension of all of them has no meaning",
    "lora_bias": "it would be scaled with its row, and no bias of a plain layer is",
}
needs = {"a mergeable delta": "a length of W0 + ΔW is one of a single weight"}
SMALLEST = torch.finfo(torch.float32).tiny
"""Of a squared length, so that a row of zeros can be divided by it."""


class DoRA(Adapted):
    """y = b + (m / n) ⊙ (W0·x + ΔW·x) with n = ‖W0 + ΔW‖ by rows, no gradient going through n (section 4.3)."""

    peft_name = "dora"
    squares: Tensor
    """‖W0‖² by rows, float32 [out]."""

    def __init__(self, base: Base, delta: Delta) -> None:
        """Lengths start as those of W0 + ΔW, which is W0 for all starts but those that make up for quantising."""
        super().__init__(base, delta)
        self.register_buffer("squares", base.weight().square().sum(1), persistent=False)
        self.magnitude = nn.Parameter(self.norm())

    def forward(self, x: Tensor) -> Tensor:
        """The bias is not scaled; both terms see the same x, dropped or not."""
        x = self.delta.dropped(x)
        y = self.delta.beside(self.base, x, x)
        lengths, bias = (self.magnitude / self.norm()).to(y.dtype), self.base.bias
        return y * lengths if bias is None else torch.addcmul(bias, y - bias, lengths)

    @torch.no_grad()
    def norm(self) -> Tensor:
        """‖W0 + ΔW‖ by rows, float32 [out]; from the factors where there are, without a tensor of W0's shape.

        ‖W0 + B·A‖² = ‖W0‖² + 2·(W0·Aᵀ ⊙ B) + (B·(A·Aᵀ) ⊙ B), each summed over a row. Terms that cancel, as where a
        start is subtracted, have to be exact: they are never rounded to what autocast computes in.
        """
        factors = self.delta.factors()
        if factors is None:
            return _lengths(self.base.weight() + self.delta.weight())
        B, A = factors
        with torch.autocast(A.device.type, enabled=False):
            kept = self.base.through(A)
            squares = self.squares + (2 * kept.t() * B).sum(1) + (F.linear(B, A @ A.t()) * B).sum(1)
        return squares.clamp(min=SMALLEST).sqrt()

    def merged_weight(self) -> Tensor:
        """M ⊙ (W0 + ΔW) / ‖W0 + ΔW‖."""
        W = self.base.weight() + self.delta.weight()
        return (self.magnitude.detach() / _lengths(W))[:, None] * W


def _lengths(W: Tensor) -> Tensor:
    """By rows, added up in the same order however W lies in memory."""
    return W.contiguous().square().sum(1).clamp(min=SMALLEST).sqrt()


make = DoRA


def shapes(out_features: int) -> dict[str, tuple[int, ...]]:
    """The lengths."""
    return {"magnitude": (out_features,)}
