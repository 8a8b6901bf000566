"""roselora: after every step only the most important entries of each row of A and column of B stay. arXiv:2406.10777

So ΔW = B·A touches few entries of W0: of r components, each a sparse column times a sparse row. Importance is |w·∂w|,
averaged over steps; what was zeroed may come back. The share that stays falls from all to `density`.
"""

from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from lora_cli.adapter import budget
from lora_cli.adapter.lifecycle import Lifecycle, Run
from lora_cli.recipe.schema import Section

needs = {"delta.lowrank or delta.gated or delta.nested": "it prunes rows of A and columns of B"}
forbids = {
    "a start that stands for a part of W0": "the part of W0 that A and B stand for would be pruned",
    "lifecycle.restart": "what starts anew is whole again",
    "lifecycle.delta_lora": "W would follow what was there before it was pruned",
    "lifecycle.sparse_adapter": "one of both has to decide what is pruned",
    "rank.prilora": "one of both has to decide what is pruned",
}


class Settings(Section):
    """Settings in a recipe: `{roselora: {density: 0.05, begin: 0.1, end: 0.7}}`."""

    density: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.05, description="Share of every row of A and column of B that is left in the end."
    )
    begin: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1, description="Share of all steps in which nothing is pruned."
    )
    end: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.7, description="Share of all steps after which `density` is reached."
    )
    beta: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.8, description="How slowly importance is averaged."
    )

    def contradictions(self) -> Iterator[str]:
        """There have to be steps in which the share falls."""
        if self.begin >= self.end:
            yield "'begin' is not before 'end'; lower it, or raise 'end'"


class RoseLoRA(Lifecycle):
    """Averages and prunes in every step."""

    def __init__(self, density: float, begin: float, end: float, beta: float) -> None:
        """As in a recipe."""
        self.density, self.begin, self.end, self.beta = density, begin, end, beta
        self.importance: dict[str, Tensor] = {}
        """`<layer>.<factor>` -> averaged |w·∂w|."""

    def setup(self, run: Run) -> None:
        """Nothing is important yet."""
        self.factors = {
            name: p for name, p in run.adapter.trainable().items() if name.rpartition(".")[2] in ("A", "B")
        }
        self.importance = {name: torch.zeros_like(p) for name, p in self.factors.items()}

    @torch.no_grad()
    def stepped(self, run: Run) -> None:
        """Average; then prune."""
        share = self.share(run.step, run.total_steps)
        for name, parameter in self.factors.items():
            if parameter.grad is not None:
                # A step that overflowed in float16 was skipped; it would stay in the averages for ever.
                now = (parameter * parameter.grad).abs().nan_to_num(0, posinf=0)
                self.importance[name].lerp_(now, 1 - self.beta)
            if share < 1:
                components = 0 if name.endswith(".A") else 1
                _prune(parameter, self.importance[name], components, share)

    def share(self, step: int, total: int) -> float:
        """Of every row of A and column of B: what is left after so many steps."""
        left = budget.left(step, round(self.begin * total), round(self.end * total))
        return self.density + (1 - self.density) * left

    def state(self) -> dict[str, Tensor]:
        """The averages."""
        return self.importance

    def restore(self, state: dict[str, Tensor]) -> None:
        """Put them back."""
        for name, mean in state.items():
            self.importance[name].copy_(mean)


make = RoseLoRA


def _prune(parameter: nn.Parameter, importance: Tensor, components: int, share: float) -> None:
    """Zero what is beyond the share of each component, `components` being the dimension that counts them.

    All keep exactly as many entries; of equally important ones the first.
    """
    along = 1 - components
    size = parameter.shape[along]
    count = max(size - int(size * (1 - share)), 1)
    order = torch.argsort(importance, dim=along, descending=True, stable=True)
    gone = torch.ones_like(parameter, dtype=torch.bool).scatter_(along, order.narrow(along, 0, count), False)
    parameter.masked_fill_(gone, 0)
