"""sparse_adapter: after a few steps the least important entries of all factors are zeroed, for good. arXiv:2210.04284

One threshold over the whole adapter, so layers keep as much as they are worth; what is left trains on. "Large-sparse"
is this with a large r: r 64 and sparsity 0.75 have as many numbers as r 16. The paper prunes before the first step,
where half of LoRA is zero and no entry has a score: here a few steps of plain LoRA come first. (Its score by |w|
alone is left out: B stays far smaller than A, and all of it would go. |w·∂w| adds up to the same over both.)
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from lora_cli.adapter import budget, held
from lora_cli.adapter.lifecycle import Lifecycle, Run
from lora_cli.adapter.seed import generator_of
from lora_cli.recipe.schema import Section

needs = {"delta.lowrank or delta.gated or delta.nested or delta.scaled": "it prunes the factors A and B"}
forbids = {
    "a start that stands for a part of W0": "the part of W0 that A and B stand for would be pruned",
    "optimizer.lora_fa": "its correction of the gradient would move what was pruned",
    "lifecycle.aflora": "what is frozen has no gradient, and no score",
    "rank.dylora": "scores would only know the components that computed in one step",
    "lifecycle.restart": "what starts anew is whole again",
    "lifecycle.dropbp": "a branch that has no gradient when scores are taken would be pruned whole",
}


class Settings(Section):
    """Settings in a recipe: `{sparse_adapter: {sparsity: 0.8}}`."""

    sparsity: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.8, description="Share of the entries of all A and B that is pruned."
    )
    after: Annotated[int, Field(ge=1)] = Field(
        default=10, description="Steps of plain training; in the next one scores are taken."
    )
    score: Literal["snip", "random"] = Field(
        default="snip", description="What an entry w is worth: |w·∂w|, or a lot."
    )


class SparseAdapter(Lifecycle):
    """Prunes once; from then on no gradient reaches what was pruned."""

    def __init__(self, sparsity: float, after: int, score: str) -> None:
        """As in a recipe."""
        self.sparsity, self.after, self.score = sparsity, after, score
        self.kept: dict[str, Tensor] = {}
        """`<layer>.<factor>` -> which entries stay; empty before the pruning."""

    def setup(self, run: Run) -> None:
        """The factors, trained or frozen at random."""
        self.factors = {
            name: p for name, p in run.adapter.trainable().items() if name.rpartition(".")[2] in ("A", "B")
        }

    @torch.no_grad()
    def gradients(self, run: Run) -> None:
        """Prune before the optimizer sees the gradient; put it off when a gradient has overflowed."""
        if not self.kept and run.step >= self.after:
            scores = self.scores(run)
            if torch.isfinite(scores).all():
                self._prune(run, scores)
        held.hold(self.factors, self.kept)

    def scores(self, run: Run) -> Tensor:
        """Of every entry of all factors."""
        if self.score == "random":
            generator = generator_of(run.train.seed, "sparse_adapter")
            found = [torch.rand(p.shape, generator=generator).to(p.device) for p in self.factors.values()]
        else:
            found = [(p * p.grad).abs() for p in self.factors.values() if p.grad is not None]
        return torch.cat([each.flatten() for each in found])

    def _prune(self, run: Run, scores: Tensor) -> None:
        count = len(scores) - int(self.sparsity * len(scores))
        sizes = [p.numel() for p in self.factors.values()]
        chosen = budget.largest(scores, count).split(sizes)
        for (name, parameter), kept in zip(self.factors.items(), chosen, strict=True):
            self.kept[name] = kept.view_as(parameter).clone()
            held.close(parameter, self.kept[name], run.optimizer)

    def state(self) -> dict[str, Tensor]:
        """What stays."""
        return self.kept

    def restore(self, state: dict[str, Tensor]) -> None:
        """Put it back."""
        self.kept = {name: kept.to(self.factors[name].device) for name, kept in state.items()}


make = SparseAdapter
