"""sora: gates are pulled towards zero after every step, and those that nothing holds open close. arXiv:2311.11696

A proximal step of the L1 norm: E ← sign(E)·max(|E| − threshold, 0). `adapter.r` is the largest rank a layer may keep;
components whose gate is zero in the end are not saved. The threshold alone decides how many, whatever the learning
rate is, as in the authors' code. For `delta: {gated: {start: 1}}` (theirs are drawn from N(0, 1), so that the draw
decides in part which gates close).
"""

from typing import Annotated

import torch
from pydantic import Field

from lora_cli.adapter.lifecycle import Lifecycle, Run
from lora_cli.recipe.schema import Section

needs = {"delta.gated": "components are closed by their gates"}
forbids = {
    "init.small": "there the gates start closed, where they would be held: delta: {gated: {start: 1}}",
    "init.closed": "there the gates start closed, where they would be held: delta: {gated: {start: 1}}",
    "init.eva": "one of both has to decide over ranks",
    "lifecycle.restart": "a rank controller decides over a whole run, not over the piece between two restarts",
}


class Settings(Section):
    """Settings in a recipe: `{sora: {threshold: 0.001}}`."""

    threshold: Annotated[float, Field(ge=0)] = Field(
        default=1e-3,
        description="How far every gate is pulled in a step; one that nothing holds closes after 1/threshold steps.",
    )


class SoRA(Lifecycle):
    """One shrinkage a step; there is nothing to remember."""

    def __init__(self, threshold: float) -> None:
        """As in a recipe."""
        self.threshold = threshold

    @torch.no_grad()
    def stepped(self, run: Run) -> None:
        """A closed gate still has a gradient: it opens again once a step of the optimizer beats the threshold."""
        for delta in run.adapter.deltas.values():
            E = delta.get_parameter("E")
            E.copy_(torch.nn.functional.softshrink(E, self.threshold))


make = SoRA
