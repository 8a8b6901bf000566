"""dora_dynamic: DoRA of dynamic rank closes the components that contribute least to ΔW of their layer. arXiv:2405.17357

Importance is ‖c_k·b_k·a_k‖ / ‖ΔW‖, averaged over steps; no gradient is needed. `adapter.r` is the rank that is left on
average; what is closed stays closed. For `delta: gated`, whose gates are the paper's c.
"""

from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from lora_cli.adapter import budget, held
from lora_cli.adapter.delta import LowRank
from lora_cli.adapter.lifecycle import Lifecycle, Run
from lora_cli.recipe.schema import Section

needs = {"delta.gated": "components are closed by their gates"}
forbids = {
    "init.eva": "one of both has to decide over ranks",
    "lifecycle.restart": "a rank controller decides over a whole run, not over the piece between two restarts",
}
SMALLEST = 1e-12
"""Beside ‖ΔW‖, which is zero at the start."""


class Settings(Section):
    """Settings in a recipe: `{dora_dynamic: {initial: 1.5, begin: 0.15, end: 0.5}}`."""

    initial: Annotated[float, Field(ge=1)] = Field(
        default=1.5, description="r at the start, over that at the end."
    )
    begin: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.15, description="Share of all steps before the first component is closed."
    )
    end: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.5, description="Share of all steps after which ranks stay what they are."
    )
    every: Annotated[int, Field(ge=1)] = Field(default=10, description="Steps between two decisions.")
    beta: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.9, description="How slowly importance is averaged."
    )
    dispersion: Annotated[float, Field(ge=0)] = Field(
        default=0.1,
        description="Weight of the penalty, until `end`, on the variance within rows of A and columns of B.",
    )

    def contradictions(self) -> Iterator[str]:
        """There have to be steps in which something is decided."""
        if self.begin >= self.end:
            yield "'begin' is not before 'end'; lower it, or raise 'end'"


def initial_r(r: int, initial: float, **_: float) -> int:
    """Components at the start of a layer that is to keep `r`."""
    return budget.more(r, initial)


class DynamicRank(Lifecycle):
    """Averages importance in every step; decides in some."""

    def __init__(
        self, initial: float, begin: float, end: float, every: int, beta: float, dispersion: float
    ) -> None:
        """As in a recipe."""
        self.initial, self.begin, self.end = initial, begin, end
        self.every, self.beta, self.dispersion = every, beta, dispersion
        self.importance: dict[str, Tensor] = {}
        """Layer -> averaged importance [r]."""
        self.open: dict[str, Tensor] = {}
        """`<layer>.E` -> which gates are."""

    def setup(self, run: Run) -> None:
        """All gates may open, nothing is important yet."""
        for name, delta in run.adapter.lowrank.items():
            E = delta.get_parameter("E")
            self.importance[name] = torch.zeros_like(E)
            self.open[f"{name}.E"] = torch.ones_like(E, dtype=torch.bool)

    def penalty(self, run: Run) -> Tensor | None:
        """Mean of Var(a row of A) + Var(a column of B) over layers, so that no few entries rule a component."""
        if not self.dispersion or run.step >= self._span(run)[1]:
            return None
        found = [delta.A.var(1).mean() + delta.B.var(0).mean() for delta in run.adapter.lowrank.values()]
        return self.dispersion * torch.stack(found).mean()

    def gradients(self, run: Run) -> None:
        """What is closed stays closed."""
        held.hold(run.adapter.named_tensors(), self.open)

    @torch.no_grad()
    def stepped(self, run: Run) -> None:
        """Average; close what is beyond the budget."""
        begin, end = self._span(run)
        if run.step > end:
            return
        for name, delta in run.adapter.lowrank.items():
            self.importance[name].lerp_(importance(delta), 1 - self.beta)
        if run.step == end or (run.step > begin and (run.step - begin) % self.every == 0):
            self._close(run, budget.left(run.step, begin, end))

    def _span(self, run: Run) -> tuple[int, int]:
        """The step after which decisions begin, and that of the last one."""
        end = max(round(self.end * run.total_steps), 1)
        return min(round(self.begin * run.total_steps), end - 1), end

    def _close(self, run: Run, left: float) -> None:
        """Close all but the most important components of all layers; ties are broken by their order."""
        deltas = run.adapter.lowrank
        sizes = [len(delta.A) for delta in deltas.values()]
        last = sum(budget.kept(size, self.initial) for size in sizes)
        count = round(last + (sum(sizes) - last) * left)
        # What is closed has no part in ΔW, but its average takes time to fall.
        scores = [self.importance[name].masked_fill(~self.open[f"{name}.E"], -1.0) for name in deltas]
        chosen = budget.largest(torch.cat(scores), count).split(sizes)
        for (name, delta), kept in zip(deltas.items(), chosen, strict=True):
            self.open[f"{name}.E"].copy_(kept)
            held.close(delta.get_parameter("E"), kept, run.optimizer)

    def state(self) -> dict[str, Tensor]:
        """The averages, and what is open."""
        return {f"{name}|importance": mean for name, mean in self.importance.items()} | self.open

    def restore(self, state: dict[str, Tensor]) -> None:
        """Put them back."""
        for name, mean in self.importance.items():
            mean.copy_(state[f"{name}|importance"])
        for name, kept in self.open.items():
            kept.copy_(state[name])


make = DynamicRank


def importance(delta: LowRank) -> Tensor:
    """‖c_k·b_k·a_k‖ / ‖ΔW‖ [r], from r × r products only: ‖b·a‖ = ‖b‖·‖a‖, ‖BA‖² = Σ (BᵀB ⊙ A·Aᵀ)."""
    B, A = delta.up(), delta.A
    whole = ((B.t() @ B) * (A @ A.t())).sum().clamp(min=0).sqrt()
    return torch.linalg.norm(B, dim=0) * torch.linalg.norm(A, dim=1) / (whole + SMALLEST)
