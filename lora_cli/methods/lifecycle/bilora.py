"""bilora: the gates of ΔW learn from other training rows than its factors. arXiv:2403.13037

ΔW = P·Λ·Q: Λ, the gates E, is to do well on a part of the rows that P and Q, the factors B and A, never learn from, so
that not all of it learns the same rows by heart. A step reads as many rows of either part; all gradients are taken at
the same point and each tensor keeps those of its own rows, which is the first-order form of the paper's two levels
(DARTS'). So a step takes twice as long, and an epoch over the other rows fewer steps. P and Q are kept near
orthonormal columns and rows by a penalty, as singular vectors would be. How the paper shares the rows out is not in
its abstract: here by halves, by lot. The rows of `data.eval` are never among them. For `delta: gated`.
"""

from collections.abc import Collection
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from lora_cli.adapter.lifecycle import Lifecycle, Run
from lora_cli.recipe.schema import Section

needs = {"delta.gated": "the gates are what learns from the other rows"}
forbids = {
    "trainable.only_core": "with A and B frozen there is nothing to learn from the first part of the rows",
    **dict.fromkeys(
        ("rank.adalora", "rank.dora_dynamic"),
        "it weighs gates and factors by what they learn from the same rows",
    ),
    **dict.fromkeys(
        ("lifecycle.r_drop", "lifecycle.load_balance"), "what it adds is a share of the rows of one part only"
    ),
}


class Settings(Section):
    """Settings in a recipe: `{bilora: {share: 0.5, orthogonality: 0.1}}`."""

    share: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.5,
        description="Share of the training rows that the gates learn from, and nothing else does.",
    )
    orthogonality: Annotated[float, Field(ge=0)] = Field(
        default=0.1, description="Weight of the penalty that keeps the factors orthonormal."
    )


class BiLoRA(Lifecycle):
    """Nothing to remember: which rows are whose follows from the seed."""

    def __init__(self, share: float, orthogonality: float) -> None:
        """As in a recipe."""
        self.share, self.orthogonality = share, orthogonality

    def held_out(self, examples: int, step: int) -> int:
        """The same ones in every step."""
        return round(self.share * examples)

    def outer(self, run: Run) -> Collection[str]:
        """The gates."""
        return [name for name in run.adapter.trainable() if name.endswith(".E")]

    def penalty(self, run: Run) -> Tensor | None:
        """γ times the mean over the layers of ‖BᵀB − I‖² + ‖A·Aᵀ − I‖²."""
        if not self.orthogonality:
            return None
        deltas = run.adapter.lowrank.values()
        found = [_apart(delta.B.t() @ delta.B) + _apart(delta.A @ delta.A.t()) for delta in deltas]
        return self.orthogonality * torch.stack(found).mean()


make = BiLoRA


def _apart(gram: Tensor) -> Tensor:
    """‖G − I‖²."""
    return (gram - torch.eye(len(gram), device=gram.device)).square().sum()
