"""alora: now and then the least important components of all go, and other layers get new ones. arXiv:2403.16187

Importance is found by ablation (AB-LoRA): the loss on held-out training rows without the component, less the loss with
it alone. In every round as many components as there are layers go, the least important ones, and the layers that lost
none share as many new ones, so that the number of all components never grows; where every layer lost one nothing is
added. `adapter.r` is the rank of every layer at first. A round costs two passes over `rows` for every component
there is. What the paper does not say: a layer keeps one component at least, new ones start as the method's init
starts them (and the model computes the same as before), and where a layer changed its optimizer starts anew. The
paper's rows are of a split of their own; these are of the training rows, and are never learned.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from lora_cli.adapter import budget
from lora_cli.adapter.delta import LowRank
from lora_cli.adapter.lifecycle import Lifecycle, Run
from lora_cli.adapter.resize import fresh, put, put_empty
from lora_cli.adapter.seed import generator_of
from lora_cli.recipe.schema import Section

FOLLOWS = "it follows the factors that each layer began with"
needs = {"delta.lowrank": "components are taken out of A and B, and put in"}
forbids = {
    "a start that stands for a part of W0": "the part of W0 that A and B stand for would be pruned",
    "init.eva": "one of both has to decide over ranks",
    "init.galore": "new components would start along a gradient that nobody has measured",
    "lifecycle.restart": "a rank controller decides over a whole run, not over the piece between two restarts",
    "combine.optimizer_view": FOLLOWS,
    **{f"lifecycle.{n}": FOLLOWS for n in ("delta_lora", "lora_drop", "roselora", "sparse_adapter")},
}


class Settings(Section):
    """Settings in a recipe: `{alora: {begin: 0.33, rounds: 8, rows: 32}}`."""

    begin: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.33, description="Share of all steps before the first round; the others follow evenly."
    )
    rounds: Annotated[int, Field(ge=1)] = Field(default=8, description="How often components are moved.")
    rows: Annotated[int, Field(ge=1)] = Field(
        default=32,
        description="Training rows that are held out to measure importance on; half of all at most.",
    )


class ALoRA(Lifecycle):
    """Moves components from layer to layer."""

    def __init__(self, begin: float, rounds: int, rows: int) -> None:
        """As in a recipe."""
        self.begin, self.rounds, self.count = begin, rounds, rows

    def setup(self, run: Run) -> None:
        """Every layer has what it was planned with."""
        self.deltas = {name: d for name, d in run.adapter.deltas.items() if isinstance(d, LowRank)}
        self.run = run

    def held_out(self, examples: int, step: int) -> int:
        """The rows that importance is measured on, never to be learned."""
        return min(self.count, examples // 2)

    def looks(self, run: Run, examples: int) -> dict[str, float]:
        """Each round twice at all held-out rows for every component."""
        passes = 2 * sum(len(delta.A) for delta in run.adapter.lowrank.values())
        return {"loss": len(self._due(run)) * passes * self.held_out(examples, 0)}

    def _due(self, run: Run) -> set[int]:
        """The steps after which there is a round; none is after the last."""
        first = max(round(self.begin * run.total_steps), 1)
        left = run.total_steps - first
        return {first + number * left // self.rounds for number in range(self.rounds)} if left else set()

    def stepped(self, run: Run) -> None:
        """A round, where one is due."""
        if run.step in self._due(run):
            self._move(run)

    def _move(self, run: Run) -> None:
        """Prune, and share out what is free."""
        count = sum(len(delta.A) for delta in self.deltas.values())
        run.say(
            f"step {run.step}  alora weighs {count:,} components, each with two passes over the held-out rows"
        )
        scores = ablate(run, self.deltas)
        kept = staying(scores)
        added = shared_out(scores, kept)
        for name, delta in self.deltas.items():
            if kept[name].all() and not added[name]:
                continue
            A, B = delta.A[kept[name]], delta.B[:, kept[name]]
            if added[name]:
                generator = generator_of(run.train.seed, f"{name}@{run.step}")
                new = fresh(run.adapter, name, added[name], generator)
                A, B = torch.cat([A, new["A"]]), torch.cat([B, new["B"]], 1)
            put(run.adapter, name, {"A": A, "B": B}, run.optimizer)

    def state(self) -> dict[str, Tensor]:
        """The rank of every layer."""
        return {"ranks": torch.tensor([len(delta.A) for delta in self.deltas.values()])}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Room for as many; the adapter's tensors come after this."""
        ranks = dict(zip(self.deltas, state["ranks"].tolist(), strict=True))
        put_empty(self.run.adapter, ranks, self.run.optimizer)


make = ALoRA


@torch.no_grad()
def ablate(run: Run, deltas: dict[str, LowRank]) -> dict[str, Tensor]:
    """Layer -> importance [r]: IS(k) = S(M) − S(M∖k) + S(M_k) with S = −loss, without S(M), which all have in common.

    M∖k is the model without component k, M_k the one with no other component in any layer.
    """
    whole = {name: delta.B.detach().clone() for name, delta in deltas.items()}
    scores = {name: torch.zeros(len(delta.A)) for name, delta in deltas.items()}
    for name, delta in deltas.items():
        for k in range(len(delta.A)):
            delta.B[:, k] = 0
            scores[name][k] = run.held_out_loss()
            delta.B[:, k] = whole[name][:, k]
    for delta in deltas.values():
        delta.B.zero_()
    for name, delta in deltas.items():
        for k in range(len(delta.A)):
            delta.B[:, k] = whole[name][:, k]
            scores[name][k] -= run.held_out_loss().cpu()
            delta.B[:, k] = 0
    for name, delta in deltas.items():
        delta.B.copy_(whole[name])
    return scores


def staying(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Layer -> which components stay: as many as there are layers go, the least of all but never a layer's best."""
    ranked = [each.clone() for each in scores.values()]
    for each in ranked:
        each[each.argmax()] = torch.inf
    sizes = [len(each) for each in ranked]
    kept = budget.largest(torch.cat(ranked), max(sum(sizes) - len(sizes), len(sizes)))
    return dict(zip(scores, kept.split(sizes), strict=True))


def shared_out(scores: dict[str, Tensor], kept: dict[str, Tensor]) -> dict[str, int]:
    """Layer -> new components: as many as went, evenly over the layers that lost none, those of the best mean first."""
    free = sum(int((~each).sum()) for each in kept.values())
    whole = sorted(
        (name for name, each in kept.items() if each.all()), key=lambda name: -scores[name].mean().item()
    )
    each, rest = divmod(free, len(whole)) if whole else (0, 0)
    new = {name: each + (place < rest) for place, name in enumerate(whole)}
    return {name: new.get(name, 0) for name in scores}
