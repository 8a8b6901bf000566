"""lora_drop: after a while the layers whose ΔW does least share one A and one B. arXiv:2402.07721

How much a layer's ΔW does is the mean of ‖ΔW·x‖² over the tokens of the next step. Of the layers of one kind (all
q_proj, say) the fewest whose shares add up to `threshold` keep their own; the others share a fresh pair. In the paper
a short training on a sample decides and a second one follows; here the first steps of the one run decide, and the
layers that keep theirs go on. (Whether the paper squares the norm is not in its abstract.)
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_cli.adapter import held
from lora_cli.adapter.delta import LowRank
from lora_cli.adapter.lifecycle import Lifecycle, Run
from lora_cli.recipe.schema import Section

needs = {"delta.lowrank": "A and B are what is shared"}
forbids = {
    "a start that stands for a part of W0": "it is a part of the W0 of one layer",
    **{
        f"lifecycle.{name}": "it follows the factors that each layer began with"
        for name in ("delta_lora", "dropbp", "restart", "roselora", "sparse_adapter")
    },
    "base.convolution": "its inputs are pictures, not tokens",
    "base.embedding": "its inputs are ids",
    "combine.optimizer_view": "it follows the factors that each layer began with",
    "optimizer.lora_fa": "its correction is of the gradient of one layer",
    "rank.prilora": "layers of different depth have different ranks",
    "trainable.only_a": "with B frozen no fresh pair could start at zero and learn",
}


class Settings(Section):
    """Settings in a recipe: `{lora_drop: {after: 0.1, threshold: 0.9}}`."""

    after: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.1, description="Share of all steps after which it is decided."
    )
    threshold: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.9,
        description="Share of ‖ΔW·x‖² that the layers with a pair of their own add up to, of each kind.",
    )


class LoRADrop(Lifecycle):
    """Decides once."""

    def __init__(self, after: float, threshold: float) -> None:
        """As in a recipe."""
        self.after, self.threshold = after, threshold
        self.shares = torch.zeros(0, dtype=torch.bool)
        """Of each layer whether it shares its pair; empty before that is decided."""

    def setup(self, run: Run) -> None:
        """Every layer has its own."""
        self.deltas = run.adapter.lowrank
        self.optimizer = run.optimizer

    def looks(self, run: Run, examples: int) -> dict[str, float]:
        """At the inputs of one step."""
        return {"inputs": run.train.batch_size}

    def stepped(self, run: Run) -> None:
        """Decide, and let those that share start afresh."""
        if run.step != max(round(self.after * run.total_steps), 1):
            return
        covariances = run.measure("inputs")
        done = {name: output(delta, covariances[name]) for name, delta in self.deltas.items()}
        kept = {
            name
            for group in kinds(self.deltas)
            for name in keeping({n: done[n] for n in group}, self.threshold)
        }
        self.shares = torch.tensor([name not in kept for name in self.deltas])
        for first in self._share():
            nn.init.zeros_(first.B)
            self.optimizer.state.pop(first.A, None)
            self.optimizer.state.pop(first.B, None)

    def _share(self) -> list[LowRank]:
        """Tie the layers of each kind that share; returns the first of each, whose tensors are those of all."""
        chosen = {name for name, shares in zip(self.deltas, self.shares.tolist(), strict=True) if shares}
        groups = [[self.deltas[name] for name in group if name in chosen] for group in kinds(self.deltas)]
        for first, *others in filter(None, groups):
            tie(first, others, self.optimizer)
        return [group[0] for group in groups if len(group) > 1]

    def state(self) -> dict[str, Tensor]:
        """Which layers share."""
        return {"shares": self.shares} if len(self.shares) else {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Let them share; or each have its own, where that was not decided yet."""
        if "shares" in state:
            self.shares = state["shares"]
            self._share()
            return
        self.shares = self.shares[:0]
        for delta in self.deltas.values():
            delta.A, delta.B = (
                nn.Parameter(p.detach().clone(), p.requires_grad) if self._is_shared(p, delta) else p
                for p in (delta.A, delta.B)
            )

    def _is_shared(self, parameter: nn.Parameter, delta: LowRank) -> bool:
        others = (each for each in self.deltas.values() if each is not delta)
        return any(parameter is each.A or parameter is each.B for each in others)


make = LoRADrop


@torch.no_grad()
def output(delta: LowRank, covariance: Tensor) -> float:
    """The mean of ‖ΔW·x‖², given that of x·xᵀ [in, in]: s²·tr(BᵀB · A·C·Aᵀ), from r × r products only."""
    A, B = delta.A, delta.B
    return float(delta.scale**2 * ((B.t() @ B) * (A @ covariance @ A.t())).sum())


def kinds(deltas: dict[str, LowRank]) -> list[list[str]]:
    """The layers that could share: of one name within their block, and of one shape."""
    found: dict[tuple[str, torch.Size, torch.Size], list[str]] = {}
    for name, delta in deltas.items():
        found.setdefault((name.rpartition(".")[2], delta.A.shape, delta.B.shape), []).append(name)
    return list(found.values())


def keeping(done: dict[str, float], threshold: float) -> list[str]:
    """The fewest whose shares add up to the threshold, largest first."""
    total, sum_so_far, kept = sum(done.values()), 0.0, list[str]()
    for name in sorted(done, key=lambda name: -done[name]):
        if sum_so_far >= threshold * total:
            break
        kept.append(name)
        sum_so_far += done[name]
    return kept


def tie(first: LowRank, others: list[LowRank], optimizer: Optimizer) -> None:
    """Let the others have the tensors of the first; their own leave the optimizer."""
    gone = [p for each in others for p, kept in ((each.A, first.A), (each.B, first.B)) if p is not kept]
    for each in others:
        each.A, each.B = first.A, first.B
    held.freeze(gone, optimizer)
