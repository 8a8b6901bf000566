"""load_balance: adds weight·N·Σ f_n·P_n to the loss, so that the N experts of a router get equal work. arXiv:2101.03961

P_n is the mean probability of expert n over all tokens of the step; f_n is the share of the choices that fell on it,
counted over all tokens of the step before, by all processes. With the counts of the step itself, as in the paper, the
loss would depend on how the step is split into micro-batches; a count that is one step old does not. In the first
step all f are equal, which asks for nothing.
"""

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor

from lora_cli.adapter.delta import Ledger
from lora_cli.adapter.lifecycle import Lifecycle, Run
from lora_cli.recipe.schema import Section

if TYPE_CHECKING:
    from lora_cli.data.example import Batch

needs = {"delta.ffn_experts or delta.malora": "only there tokens are sent to some experts and not to others"}


class Settings(Section):
    """Settings in a recipe: `{load_balance: {weight: 0.01}}`."""

    weight: Annotated[float, Field(gt=0)] = Field(
        default=0.01, description="Of the balance in the loss; 1 times it is what equal loads cost."
    )


class LoadBalance(Lifecycle):
    """Mean over the routers, so that `weight` means the same in a deep model."""

    rehearsable = False
    # What it adds up is of all blocks, of which a few are rehearsed; beside the experts it is nothing.

    def __init__(self, weight: float) -> None:
        """As in a recipe."""
        self.weight = weight

    def setup(self, run: Run) -> None:
        """No choice has been counted."""
        self.ledgers = ledgers_of(run)
        for ledger in self.ledgers:
            ledger.asked = True
        router = next(p for name, p in run.adapter.named_tensors().items() if name.endswith(".router"))
        self.counts = torch.zeros(len(self.ledgers), len(router), dtype=torch.float64, device=router.device)
        self.load = torch.full_like(self.counts, 1 / len(router))
        """f of each router and expert."""

    def begin_step(self, run: Run) -> None:
        """Count anew; what was decided since, in an evaluation or in vain, does not count."""
        self.counts.zero_()
        for ledger in self.ledgers:
            ledger.clear()

    def loss(self, run: Run, batch: "Batch") -> Tensor:
        """Of the tokens of this micro-batch; padding is no token."""
        device = self.counts.device
        real = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
        real = real.bool().to(device).flatten()
        sums: list[Tensor] = []
        for ledger, counts in zip(self.ledgers, self.counts, strict=True):
            assert ledger.probabilities is not None
            assert ledger.chosen is not None
            counts += ledger.chosen.flatten(0, -2)[real].sum(0)
            sums.append(ledger.probabilities.flatten(0, -2)[real].sum(0))
            ledger.clear()
        experts = self.load.shape[1]
        total = (self.load.float() * torch.stack(sums)).sum()
        return self.weight * experts * total / (len(sums) * run.tokens)

    def gradients(self, run: Run) -> None:
        """The counts of this step are the load of the next."""
        run.add_up([self.counts])
        self.load = self.counts / self.counts.sum(1, keepdim=True)

    def state(self) -> dict[str, Tensor]:
        """The load."""
        return {"load": self.load}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Put it back."""
        self.load = state["load"].to(self.load.device)


def ledgers_of(run: Run) -> list[Ledger]:
    """One a router, however many layers share it."""
    found = [delta.ledger for delta in run.adapter.deltas.values() if delta.ledger is not None]
    return list({id(ledger): ledger for ledger in found}.values())


make = LoadBalance
