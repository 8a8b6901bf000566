"""delta_lora: W moves with ΔW, by λ times every step that s·B·A makes, without a gradient of its own. arXiv:2309.02411

From step `after` on, W = W0 + λ·s·(B·A − B_K·A_K), which adds up over the steps to what is kept here as fixed factors:
no weight is written. Saved as LoRA.
"""

from typing import Annotated

import torch
from pydantic import Field

from lora_cli.adapter.delta import LowRank
from lora_cli.adapter.lifecycle import Lifecycle, Run
from lora_cli.recipe.schema import Section

needs = {"delta.lowrank": "W moves by what B·A does"}
forbids = {
    "dropout": "W would move by more than what was computed with",
    "rank.prilora": "W would follow what was there before it was pruned",
    "lifecycle.sparse_adapter": "W would follow what was there before it was pruned",
    "lifecycle.restart": "the factors that W follows would jump",
}


class Settings(Section):
    """Settings in a recipe: `{delta_lora: {ratio: 2, after: 500}}`."""

    ratio: Annotated[float, Field(gt=0)] = Field(
        default=2.0, description="λ: steps of W over steps of s·B·A."
    )
    after: Annotated[int, Field(ge=0)] = Field(default=500, description="Steps of plain LoRA before W moves.")


class DeltaLoRA(Lifecycle):
    """Keeps the last 2r of the fixed components at λ·s·(B·A − B_K·A_K)."""

    def __init__(self, ratio: float, after: int) -> None:
        """As in a recipe."""
        self.ratio, self.after = ratio, after

    def setup(self, run: Run) -> None:
        """Room for both terms, at zero."""
        for delta in run.adapter.deltas.values():
            assert isinstance(delta, LowRank)
            delta.fix(torch.zeros_like(delta.B).repeat(1, 2), torch.zeros_like(delta.A).repeat(2, 1))
        if self.after == 0:
            self._remember(run)
            self._write(run, 2, 1.0)

    def stepped(self, run: Run) -> None:
        """Follow B·A; at step `after` remember where it is."""
        if run.step == self.after:
            self._remember(run)
        if run.step >= self.after:
            self._write(run, 2, 1.0)

    def _remember(self, run: Run) -> None:
        self._write(run, 1, -1.0)

    @torch.no_grad()
    def _write(self, run: Run, place: int, sign: float) -> None:
        """Write ±λ·s·B·A in the `place`-th block of r fixed components, from the end."""
        for delta in run.adapter.deltas.values():
            assert isinstance(delta, LowRank)
            assert delta.fixed_A is not None
            assert delta.fixed_B is not None
            r = delta.A.shape[0]
            end = delta.fixed_A.shape[0] - (place - 1) * r
            delta.fixed_B[:, end - r : end] = sign * self.ratio * delta.scale * delta.B
            delta.fixed_A[end - r : end] = delta.A


make = DeltaLoRA
