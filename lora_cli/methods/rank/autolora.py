"""autolora: learns on held-out training rows which components count, then trains with these ranks. arXiv:2403.09113

In the first part of the run A and B learn from some of the training rows and the shares from the others. Then a layer
keeps the components with a share of 1/r at least, `adapter.r` being the r at first, and a training from scratch
follows, as LoRA with these ranks on all rows. The shares' gradient is of first order, as in one of the authors' two
programs (the other goes through one step of A and B); both sides of a step are taken at the same point. In the paper
the second training is a run of its own: here it has the rest of the steps and of the course of the learning rate, the
scale of the first, and what trains beside A and B (norms, new tokens, DoRA's lengths) goes on as it was left. For
`delta: selected`.
"""

from collections.abc import Collection
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from lora_cli.adapter import held
from lora_cli.adapter.lifecycle import Lifecycle, Run
from lora_cli.adapter.resize import fresh, put, put_empty
from lora_cli.adapter.seed import generator_of
from lora_cli.adapter.selected import Selected
from lora_cli.recipe.schema import Section

needs = {"delta.selected": "ranks are decided by the shares of its components"}
forbids = {
    "init.eva": "one of both has to decide over ranks",
    "init.galore": "it would start anew along a gradient that nobody has measured",
    "lifecycle.restart": "a rank controller decides over a whole run, not over the piece between two restarts",
    "lifecycle.r_drop": "what it adds is a share of the rows of one part only",
    **dict.fromkeys(
        ("combine.optimizer_view", "lifecycle.roselora", "lifecycle.sparse_adapter"),
        "it follows the factors that each layer began with",
    ),
}
ROUNDING = 1e-6


class Settings(Section):
    """Settings in a recipe: `{autolora: {search: 0.3, held_out: 0.3}}`."""

    search: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.3,
        description="Share of all steps in which shares are learned; then it starts from scratch.",
    )
    held_out: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.3, description="Share of the training rows that shares are learned on, and A and B are not."
    )


class AutoLoRA(Lifecycle):
    """Decides once."""

    def __init__(self, search: float, held_out: float) -> None:
        """As in a recipe."""
        self.search, self.share = search, held_out

    def setup(self, run: Run) -> None:
        """Nothing is decided."""
        self.deltas = {name: d for name, d in run.adapter.deltas.items() if isinstance(d, Selected)}
        self.first = {name: len(delta.A) for name, delta in self.deltas.items()}
        self.decided, self.run = False, run

    def _end(self) -> int:
        """Steps of the search."""
        return max(round(self.search * self.run.total_steps), 1)

    def held_out(self, examples: int, step: int) -> int:
        """While shares are learned; one example at least."""
        return max(round(self.share * examples), 1) if step < self._end() else 0

    def outer(self, run: Run) -> Collection[str]:
        """The shares."""
        return () if self.decided else [f"{name}.E" for name in self.deltas]

    def stepped(self, run: Run) -> None:
        """Decide, and start from scratch, unless the run is over."""
        if run.step != self._end() or run.step == run.total_steps:
            return
        for name, delta in self.deltas.items():
            generator = generator_of(run.train.seed, f"{name}@{run.step}")
            new = fresh(run.adapter, name, int(staying(delta.E.detach()).sum()), generator)
            put(run.adapter, name, new, run.optimizer)
        self._decide()

    def _decide(self) -> None:
        """Let all components that there are count in full, and learn no shares any more."""
        self.decided = True
        for delta in self.deltas.values():
            delta.decided = True
        held.freeze([delta.E for delta in self.deltas.values()], self.run.optimizer)

    def state(self) -> dict[str, Tensor]:
        """The rank of every layer, once that is decided."""
        return {"ranks": torch.tensor([len(d.A) for d in self.deltas.values()])} if self.decided else {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Room for as many components; the adapter's tensors come after this."""
        ranks = dict(zip(self.deltas, state["ranks"].tolist(), strict=True)) if state else self.first
        put_empty(self.run.adapter, ranks, self.run.optimizer)
        if state:
            self._decide()
            return
        self.decided = False
        for delta in self.deltas.values():
            delta.decided = False


make = AutoLoRA


def staying(E: Tensor) -> Tensor:
    """Which components have a share of 1/r at least; equal ones all do, whatever rounding makes of them."""
    return E.softmax(0) * len(E) >= 1 - ROUNDING
