"""dylora: every step trains the first b components only, b drawn anew from 1 to r, as LoRA of rank b. arXiv:2210.07558

One training serves every rank: components are sorted by importance, and `lora export --r b` cuts the adapter down to
its first b. The loss of a step is that of its b; held-out rows are measured with all r. For `delta: nested`.
"""

import torch
from pydantic import Field
from torch import Tensor

from lora_cli.adapter.lifecycle import Lifecycle, Run
from lora_cli.adapter.nested import Nested
from lora_cli.adapter.seed import generator_of
from lora_cli.recipe.schema import Section

needs = {"delta.nested": "its first components are LoRA of their own"}
forbids = {
    "init.eva": "one of both has to decide over ranks",
    "lifecycle.restart": "what W takes in is of all ranks at once, and could not be cut",
    "lifecycle.delta_lora": "what W takes in is of all ranks at once, and could not be cut",
}


class Settings(Section):
    """Settings in a recipe: `{dylora: {frozen: true}}`."""

    frozen: bool = Field(
        default=False,
        description="Give a gradient to the b-th component only, not to those before it: faster and a little worse.",
    )


class DyLoRA(Lifecycle):
    """Draws b between steps, from (seed, step)."""

    rehearsable = False

    def __init__(self, frozen: bool) -> None:
        """As in a recipe."""
        self.frozen, self.b = frozen, torch.zeros((), dtype=torch.int64)

    def setup(self, run: Run) -> None:
        """The b of the first step."""
        self.deltas = [delta for delta in run.adapter.deltas.values() if isinstance(delta, Nested)]
        self._draw(run)

    def gradients(self, run: Run) -> None:
        """The frozen mode of the paper: what was learned before is left to the smaller b."""
        if not self.frozen:
            return
        for delta in self.deltas:
            for factor, components in ((delta.A, 0), (delta.B, 1)):
                if factor.grad is not None:
                    factor.grad.narrow(components, 0, delta.b - 1).zero_()

    def stepped(self, run: Run) -> None:
        """The b of the next step."""
        self._draw(run)

    def _draw(self, run: Run) -> None:
        largest = max((delta.r for delta in self.deltas), default=1)
        generator = generator_of(run.train.seed, f"b@{run.step}")
        self._use(int(torch.randint(1, largest + 1, (), generator=generator)))

    def _use(self, b: int) -> None:
        """A layer whose r is smaller than b computes with all it has."""
        self.b.fill_(b)
        for delta in self.deltas:
            delta.b = min(b, delta.r)

    def state(self) -> dict[str, Tensor]:
        """The b of the next step."""
        return {"b": self.b}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Put it back."""
        self._use(int(state["b"]))


make = DyLoRA
