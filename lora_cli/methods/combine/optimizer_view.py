"""optimizer_view: W = W0 + s·B·A is one weight, trained; its gradient G is projected onto A and B as it arrives.

LoRA seen as an optimizer (Su, kexue.fm/archives/9590): A and B are its state, s·BᵀG and s·G·Aᵀ their gradients, and W
moves by s·(B'A' − BA). The same steps as LoRA; the layer computes what a plain one does, at the price of the full
gradient of one layer at a time and a float32 copy of W.
"""

from typing import Self

import torch
from torch import Tensor

from lora_cli.adapter.base import Base
from lora_cli.adapter.delta import Delta, LowRank
from lora_cli.adapter.layer import Adapted

needs = {"delta.lowrank": "the gradient is projected onto two factors"}
forbids = {
    "dropout": "there is no input of A from which something could be dropped",
    "lora_bias": "there is no B whose bias could be added",
    "base.embedding": "every step would touch every row of the vocabulary",
    "base.quantized": "W is written after every step",
    "train.parallel": "each process would keep a whole W of every layer, in float32",
}


class OptimizerView(Adapted):
    """W, and what keeps it at W0 + ΔW."""

    delta: LowRank

    def __init__(self, base: Base, delta: Delta) -> None:
        """W is a leaf of the graph, but no tensor of the adapter: it follows from A and B."""
        super().__init__(base, delta)
        assert isinstance(delta, LowRank)
        self._W: list[Tensor] = []  # in a list, so that nn.Module does not count it among the parameters
        self._of: tuple[int, int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """W·x + b; as a sum while somebody measures the gradient of the W that is kept."""
        if self.base_layer.weight.requires_grad:
            return super().forward(x)
        y = self.base.project(x, self.folded().to(x.dtype))
        return y if self.base.bias is None else y + self.base.bias.to(y.dtype)

    def folded(self) -> Tensor:
        """W0 + ΔW in float32 [out, in]; computed anew after every backward pass, and whenever A or B was written to.

        A fused optimizer writes without raising the version of what it writes to: hence both.
        """
        now = (self.delta.A._version, self.delta.B._version)
        if self._of != now:
            with torch.no_grad():
                W = self.base.weight() + self.delta.weight()
            if not self._W:
                self._W.append(W.clone().requires_grad_())
                self._W[0].register_post_accumulate_grad_hook(self._project)
            self._W[0].detach().copy_(W)
            self._of = now
        return self._W[0]

    def train(self, mode: bool = True) -> Self:
        """W is computed anew: after an evaluation, momentum may move A and B in a step that has no gradient for W."""
        self._of = None
        return super().train(mode)

    @torch.no_grad()
    def _project(self, W: Tensor) -> None:
        """Add s·BᵀG to A's gradient and s·G·Aᵀ to B's, and let go of G."""
        G, W.grad, self._of = W.grad, None, None
        assert G is not None
        s, A, B = self.delta.scale, self.delta.A, self.delta.B
        for parameter, gradient in ((A, s * (B.t() @ G)), (B, s * (G @ A.t()))):
            if parameter.requires_grad:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


make = OptimizerView


def shapes(out_features: int) -> dict[str, tuple[int, ...]]:
    """It has no tensors of its own."""
    return {}
