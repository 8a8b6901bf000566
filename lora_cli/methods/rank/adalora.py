"""adalora: starts with more components than wanted, and closes the least important of all layers. arXiv:2303.10512

Importance is sensitivity |w·∂w| times its uncertainty, both averaged over steps. Layers that matter keep a larger rank.
`adapter.r` is the rank that is left on average. For `delta: gated`.
"""

from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from lora_cli.adapter import budget
from lora_cli.adapter.lifecycle import Lifecycle, Run
from lora_cli.recipe.schema import Section

needs = {"delta.gated": "components are closed by their gates"}
forbids = {"init.eva": "one of both has to decide over ranks"}


class Settings(Section):
    """Settings in a recipe: `{adalora: {initial: 1.5, warmup: 0.1, final: 0.3}}`."""

    initial: Annotated[float, Field(ge=1)] = Field(
        default=1.5, description="r at the start, over that at the end."
    )
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1, description="Share of all steps before the first component is closed."
    )
    final: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.3, description="Share of all steps, at the end, in which ranks stay what they are."
    )
    every: Annotated[int, Field(ge=1)] = Field(default=10, description="Steps between two decisions.")
    beta: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.85, description="How slowly importance is averaged."
    )
    orthogonality: Annotated[float, Field(ge=0)] = Field(
        default=0.1, description="Weight of the penalty that keeps components apart."
    )

    def contradictions(self) -> Iterator[str]:
        """There have to be steps in which something is decided."""
        if self.warmup + self.final >= 1:
            yield "'warmup' and 'final' leave no step between them; lower one of them"


def initial_r(r: int, initial: float, **_: float) -> int:
    """Components at the start of a layer that is to keep `r`."""
    return budget.more(r, initial)


class AdaLoRA(Lifecycle):
    """Averages importance in every step; decides in some."""

    def __init__(
        self, initial: float, warmup: float, final: float, every: int, beta: float, orthogonality: float
    ) -> None:
        """As in a recipe."""
        self.initial, self.warmup, self.final = initial, warmup, final
        self.every, self.beta, self.orthogonality = every, beta, orthogonality
        self.averages: dict[str, Tensor] = {}
        """`<layer>.<factor>|mean` and `|spread`."""

    def setup(self, run: Run) -> None:
        """Nothing is important yet."""
        for name, delta in run.adapter.lowrank.items():
            for key in ("A", "B", "E"):
                for kind in ("mean", "spread"):
                    self.averages[f"{name}.{key}|{kind}"] = torch.zeros_like(delta.get_parameter(key))

    def penalty(self, run: Run) -> Tensor | None:
        """γ times the mean over all factors of ‖BᵀB − I‖ and ‖A·Aᵀ − I‖, not squared, as the authors' code."""
        if not self.orthogonality:
            return None
        deltas = run.adapter.lowrank.values()
        found = [gram for delta in deltas for gram in (delta.B.t() @ delta.B, delta.A @ delta.A.t())]
        norms = [torch.linalg.norm(gram - torch.eye(len(gram), device=gram.device)) for gram in found]
        return self.orthogonality * torch.stack(norms).mean()

    @torch.no_grad()
    def stepped(self, run: Run) -> None:
        """Average; then close what is beyond the budget.

        Between two decisions a closed gate learns like any other, so that the next one may open it (section 4 of
        the paper). At the end nothing is averaged any more: the same gates are closed after every step.
        """
        if run.step <= self._span(run)[1]:
            for name, delta in run.adapter.lowrank.items():
                for key in ("A", "B", "E"):
                    self._average(f"{name}.{key}", delta.get_parameter(key))
        count = self.budget(run)
        if count is not None:
            self._close(run, count)

    def _average(self, name: str, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        mean, spread = self.averages[f"{name}|mean"], self.averages[f"{name}|spread"]
        # A step that overflowed in float16 was skipped; what is not a number would stay in the averages for ever.
        importance = (parameter * parameter.grad).abs().nan_to_num(0, posinf=0)
        mean.lerp_(importance, 1 - self.beta)
        spread.lerp_((importance - mean).abs(), 1 - self.beta)

    def budget(self, run: Run) -> int | None:
        """Components that may be open after this step, over all layers; None where nothing is decided."""
        sizes = [len(delta.A) for delta in run.adapter.lowrank.values()]
        first, last = sum(sizes), sum(budget.kept(size, self.initial) for size in sizes)
        begin, end = self._span(run)
        if run.step < end and (run.step <= begin or (run.step - begin) % self.every):
            return None
        return round(last + (first - last) * budget.left(run.step, begin, end))

    def _span(self, run: Run) -> tuple[int, int]:
        """The step after which decisions begin, and that of the last one."""
        return round(self.warmup * run.total_steps), round((1 - self.final) * run.total_steps)

    def _close(self, run: Run, count: int) -> None:
        """Zero the gates of all but the `count` most important components; ties are broken by their order."""
        deltas = run.adapter.lowrank
        is_open = budget.largest(torch.cat([self._scores(name) for name in deltas]), count)
        sizes = [len(delta.A) for delta in deltas.values()]
        for delta, kept in zip(deltas.values(), is_open.split(sizes), strict=True):
            delta.get_parameter("E").mul_(kept)

    def _scores(self, name: str) -> Tensor:
        """s(E_k) + mean of s(A_kj) + mean of s(B_ik), where s is mean times spread."""
        s = {
            key: self.averages[f"{name}.{key}|mean"] * self.averages[f"{name}.{key}|spread"] for key in "ABE"
        }
        return s["E"] + s["A"].mean(1) + s["B"].mean(0)

    def state(self) -> dict[str, Tensor]:
        """The averages."""
        return self.averages

    def restore(self, state: dict[str, Tensor]) -> None:
        """Put them back."""
        for name, tensor in state.items():
            self.averages[name].copy_(tensor)


make = AdaLoRA
