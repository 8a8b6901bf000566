"""prilora: ranks rise from the first block to the last, and rows of A are pruned now and then. arXiv:2401.11316

`adapter.r` is the rank in the middle; with r 8 it is 4 in the first block and 12 in the last, as in the paper. An entry
of A counts |A_kj|·‖x_j‖, where the norm of the layer's inputs is averaged over all prunings; the least of every row
are set to zero, and learn on from there. How often, how many and how averages are made is not in the abstract, and
the authors' code is not public: these are settings.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from lora_cli.adapter import held
from lora_cli.adapter.lifecycle import Lifecycle, Run
from lora_cli.recipe.schema import Section

needs = {"delta.lowrank or delta.gated": "it prunes the A that x meets"}
forbids = {
    "a start that stands for a part of W0": "the part of W0 that A stands for would be pruned",
    "init.eva": "one of both has to decide over ranks",
    "base.convolution": "its inputs are pictures, not tokens",
    "base.embedding": "its inputs are ids, which have no norm",
    "trainable.lora_fa": "it prunes an A that trains",
    "lifecycle.restart": "a rank controller decides over a whole run, not over the piece between two restarts",
}


class Settings(Section):
    """Settings in a recipe: `{prilora: {spread: 0.5, every: 40, share: 0.5}}`."""

    spread: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.5, description="r of the first block is (1 − spread)·r, that of the last (1 + spread)·r."
    )
    every: Annotated[int, Field(ge=1)] = Field(default=40, description="Steps between two prunings.")
    share: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.5, description="Share of every row of A that is set to zero."
    )
    beta: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.9, description="How slowly the squares of the inputs are averaged."
    )


def initial_r(r: int, depth: float, spread: float, **_: float) -> int:
    """R of a layer that is so deep in the model, from 0 to 1."""
    return max(round(r * (1 - spread + 2 * spread * depth)), 1)


class PRILoRA(Lifecycle):
    """Looks at the inputs of the next step whenever it prunes."""

    def __init__(self, spread: float, every: int, share: float, beta: float) -> None:
        """As in a recipe; the ranks stand before the first step."""
        self.every, self.share, self.beta = every, share, beta
        self.squares: dict[str, Tensor] = {}
        """Layer -> averaged x_j² [in]; zero before the first pruning."""

    def setup(self, run: Run) -> None:
        """Nothing was seen yet."""
        for name, delta in run.adapter.deltas.items():
            A = delta.get_parameter("A")
            self.squares[name] = torch.zeros(A.shape[1], device=A.device)

    def looks(self, run: Run, examples: int) -> dict[str, float]:
        """At the inputs of a step for each pruning."""
        return {"inputs": (run.total_steps - 1) // self.every * run.train.batch_size}

    def stepped(self, run: Run) -> None:
        """Prune, unless the run is over."""
        if run.step % self.every or run.step == run.total_steps:
            return
        for name, covariance in run.measure("inputs").items():
            mean, now = self.squares[name], covariance.diagonal()
            mean.lerp_(now, 1 - self.beta if mean.any() else 1.0)
            A = run.adapter.deltas[name].get_parameter("A")
            assert isinstance(A, torch.nn.Parameter)
            held.close(A, most_of_rows(A.detach().abs() * mean.sqrt(), self.share), run.optimizer)

    def state(self) -> dict[str, Tensor]:
        """The averages."""
        return self.squares

    def restore(self, state: dict[str, Tensor]) -> None:
        """Put them back."""
        for name, mean in state.items():
            self.squares[name].copy_(mean)


make = PRILoRA


def most_of_rows(scores: Tensor, share: float) -> Tensor:
    """Which entries stay when the lowest `share` of every row goes: of each as many, of equal ones the first."""
    count = scores.shape[1] - int(share * scores.shape[1])
    order = torch.argsort(scores, dim=1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :count], True)
