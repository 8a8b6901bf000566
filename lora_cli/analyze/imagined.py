"""What the parts of a method see of a run that is rehearsed: it is told what they ask for, and nothing is looked at."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.optim import Optimizer
from transformers import PreTrainedModel

from lora_cli import parts
from lora_cli.adapter.inject import Adapter
from lora_cli.adapter.lifecycle import Lifecycle
from lora_cli.adapter.plan import LayerSpec
from lora_cli.data.example import Batch
from lora_cli.recipe.schema import TrainRecipe
from lora_cli.train.loss import Loss
from lora_cli.train.twice import Twice

LONG = 10_000
"""Steps of a run of which nobody says how many it has, and examples: enough for the first to be like most."""


@dataclass
class Imagined:
    """A run of which one step is taken, in which nothing is decided that comes every so many steps."""

    model: PreTrainedModel
    adapter: Adapter
    optimizer: Optimizer
    train: TrainRecipe
    step: int = 0
    total_steps: int = LONG
    examples: int = LONG
    tokens: int = 1
    trained_tokens: int = 1
    again: int = 0
    """Passes without a gradient that were asked for beside that of the loss."""

    def __post_init__(self) -> None:
        """Make the parts, as `Training` does."""
        method = self.adapter.plan.method
        chosen = [("rank", method.rank), *(("lifecycle", part) for part in method.lifecycle)]
        self.lifecycles: tuple[Lifecycle, ...] = tuple(
            parts.load(axis, part.name).make(**parts.settings(axis, part)) for axis, part in chosen
        )
        self.loss: Loss | None = None
        self.learned = 0
        """Positions of the micro-batch at hand."""

    @property
    def rehearsed(self) -> list[Lifecycle]:
        """The parts whose steps can be taken without numbers."""
        return [each for each in self.lifecycles if each.rehearsable]

    @property
    def measures(self) -> str | None:
        """What the method's init wants to know of the model, if anything."""
        return getattr(parts.load("init", self.adapter.plan.method.init.name), "measures", None)

    @property
    def bilevel(self) -> bool:
        """Whether some tensors learn from other rows than the rest, in the steps that hold some out."""
        return any(each.outer(self) for each in self.lifecycles)

    @property
    def doubled(self) -> float:
        """Share of the steps that read as many rows again, for these tensors."""
        if not self.bilevel:
            return 0.0
        steps = range(self.total_steps)
        held = sum(any(each.held_out(self.examples, step) for each in self.lifecycles) for step in steps)
        return held / self.total_steps

    @property
    def looks(self) -> Counter[str]:
        """Rows that the run reads beside its steps, by what for."""
        found = Counter[str]()
        for each in self.lifecycles:
            found.update(each.looks(self, self.examples))
        return found

    @property
    def later(self) -> float:
        """Bytes that the parts come to keep on the way."""
        return sum(each.later(self) for each in self.lifecycles)

    @property
    def backward(self) -> tuple[float, float]:
        """Shares of the residual branches that have a backward pass, on average and at most."""
        with unset_fake_temporarily():  # which are drawn by lot
            return min((each.backward(self) for each in self.lifecycles), default=(1.0, 1.0))

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """There is one process."""

    def measure(self, kind: str) -> dict[str, Tensor]:
        """What it would find."""
        return found(kind, self.adapter.plan.layers)

    def say(self, text: str, /) -> None:
        """Nobody watches."""

    def held_out_loss(self) -> Tensor:
        """Nobody knows."""
        return torch.zeros(())

    def second_passes(self) -> Callable[[Batch], Tensor]:
        """One through the blocks is counted; what follows it is computed."""

        def again(loss: Loss, batch: Batch, positions: Tensor) -> Tensor:
            self.again += 1
            head = self.model.get_output_embeddings()
            assert isinstance(head, nn.Linear)
            width = head.in_features if loss.scale is not None else head.out_features
            return positions.new_empty(len(positions), width, dtype=head.weight.dtype)

        twice = Twice(self.model, nullcontext, again)

        def divergence(batch: Batch) -> Tensor:
            assert self.loss is not None
            return twice.at(self.loss, batch, torch.zeros(self.learned, dtype=torch.int64))

        return divergence


def found(kind: str, layers: Sequence[LayerSpec]) -> dict[str, Tensor]:
    """What `measure` finds of each layer, without its numbers."""
    shapes = {
        "inputs": lambda spec: (spec.in_features, spec.in_features),
        "gradients": lambda spec: (spec.out_features, spec.in_features),
        "fisher": lambda spec: (spec.out_features + spec.in_features,),
    }
    return {spec.name: torch.empty(shapes[kind](spec)) for spec in layers}
