"""lora_fa: AdamW on B's gradient, corrected for the frozen A: g ← s⁻²·g·(A·Aᵀ)⁻¹. arXiv:2308.03303

s·g·A is then the best approximation, among all changes that B can make, of the full gradient G: its least-squares
projection on the rows of A.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lora_cli.adapter.delta import LowRank
from lora_cli.recipe.schema import TrainRecipe

if TYPE_CHECKING:
    from lora_cli.adapter.inject import Adapter

needs = {"trainable.lora_fa": "the correction holds for an A that stays", "delta.lowrank": "it needs A and B"}


def make(groups: list[dict[str, Any]], train: TrainRecipe, adapter: "Adapter") -> Optimizer:
    """AdamW that corrects the gradients first."""
    device = groups[0]["params"][0].device.type
    optimizer = AdamW(groups, lr=train.learning_rate, betas=train.betas, fused=device in ("cuda", "cpu"))
    deltas = list(adapter.lowrank.values())
    optimizer.register_step_pre_hook(lambda *_: correct(deltas))
    return optimizer


@torch.no_grad()
def correct(deltas: list[LowRank]) -> None:
    """Replace every gradient of a B."""
    for delta in deltas:
        if delta.B.grad is not None:
            delta.B.grad = projected(delta.B.grad, delta.A, delta.scale)


def projected(gradient: Tensor, A: nn.Parameter, scale: float) -> Tensor:
    """s⁻²·g·(A·Aᵀ)⁻¹ by solving, in float32; a little on the diagonal where the rows of A are not independent."""
    gram = (A @ A.t()).float()
    gram.diagonal().add_(1e-6 * gram.diagonal().mean())
    # Without waiting for a GPU to say that it went well.
    solved, _ = torch.linalg.solve_ex(gram, gradient.float().t())
    return solved.t().to(gradient.dtype) / scale**2
