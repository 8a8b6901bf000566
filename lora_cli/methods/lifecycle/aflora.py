"""aflora: A's and B's are frozen one after the other, those first that hardly learn any more. arXiv:2403.13269

The score of a tensor is the mean of Ī·Ū over its entries, where I is |∂w| averaged over a window of steps, Ī the
average of I over windows, and Ū that of |I − Ī|. Between `begin` and `end` the number of frozen tensors rises along a
cubic to all of them; b and d of `delta: scaled` train to the end. (The authors' code compares the mean of a tensor
with a quantile over single entries, by which the number of frozen tensors is not the one of the schedule.)
"""

import math
from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from lora_cli.adapter import budget, held
from lora_cli.adapter.lifecycle import Lifecycle, Run
from lora_cli.recipe.schema import Section

needs = {"delta.scaled": "once A and B are frozen, b and d are what trains"}
forbids = {"lifecycle.dropbp": "what is dropped would look as if it hardly learned"}


class Settings(Section):
    """Settings in a recipe: `{aflora: {begin: 0.05, end: 0.3, every: 10}}`."""

    begin: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.05, description="Share of all steps before the first tensor is frozen."
    )
    end: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.3, description="Share of all steps after which every A and B is frozen."
    )
    every: Annotated[int, Field(ge=1)] = Field(
        default=10, description="Steps of a window, at the end of which is decided."
    )

    def contradictions(self) -> Iterator[str]:
        """There have to be steps in which something is decided."""
        if self.begin >= self.end:
            yield "'begin' is not before 'end'; lower it, or raise 'end'"


SLOW, SPREAD = 0.85, 0.95
"""How slowly Ī and Ū follow, as in the authors' code."""


class AFLoRA(Lifecycle):
    """Sums gradients in every step, averages and freezes at the end of every window."""

    def __init__(self, begin: float, end: float, every: int) -> None:
        """As in a recipe."""
        self.begin, self.end, self.every = begin, end, every
        self.averages: dict[str, Tensor] = {}
        """`<layer>.<factor>|window`, `|mean` and `|spread`, of the tensors that still train."""

    def setup(self, run: Run) -> None:
        """Everything trains."""
        self.optimizer = run.optimizer
        self.factors = {
            name: p for name, p in run.adapter.trainable().items() if name.rpartition(".")[2] in ("A", "B")
        }
        self.averages = {
            f"{name}|{kind}": torch.zeros_like(p)
            for name, p in self.factors.items()
            for kind in ("window", "mean", "spread")
        }

    @torch.no_grad()
    def gradients(self, run: Run) -> None:
        """Add |∂w|; a step that overflowed in float16 is none."""
        for name in self._training():
            gradient = self.factors[name].grad
            if gradient is not None:
                self.averages[f"{name}|window"] += gradient.abs().nan_to_num(0, posinf=0) / self.every

    def stepped(self, run: Run) -> None:
        """At the end of a window: average, and freeze as many as planned."""
        end = max(round(self.end * run.total_steps), 1)
        if run.step > end or (run.step % self.every and run.step != end):
            return
        for name in self._training():
            self._average(name)
        share = 1 - budget.left(run.step, min(round(self.begin * run.total_steps), end - 1), end)
        training = self._training()
        stay = len(self.factors) - math.floor(share * len(self.factors))
        kept = budget.largest(torch.stack([self._score(name) for name in training]), stay).tolist()
        self._freeze([name for name, stays in zip(training, kept, strict=True) if not stays])

    def _training(self) -> list[str]:
        return [name for name, parameter in self.factors.items() if parameter.requires_grad]

    def _average(self, name: str) -> None:
        window, mean, spread = (self.averages[f"{name}|{kind}"] for kind in ("window", "mean", "spread"))
        mean.lerp_(window, 1 - SLOW)
        spread.lerp_((window - mean).abs(), 1 - SPREAD)
        window.zero_()

    def _score(self, name: str) -> Tensor:
        return (self.averages[f"{name}|mean"] * self.averages[f"{name}|spread"]).mean()

    def _freeze(self, names: list[str]) -> None:
        held.freeze([self.factors[name] for name in names], self.optimizer)
        for name in names:
            for kind in ("window", "mean", "spread"):
                del self.averages[f"{name}|{kind}"]

    def state(self) -> dict[str, Tensor]:
        """The averages; what has none is frozen."""
        return self.averages

    def restore(self, state: dict[str, Tensor]) -> None:
        """Put them back, and freeze what was frozen."""
        self._freeze([name for name in self._training() if f"{name}|mean" not in state])
        for name, average in self.averages.items():
            average.copy_(state[name])


make = AFLoRA
