"""Lifecycle: what happens between steps. Every hook does nothing until a part overrides it.

Whatever is random is drawn from (seed, step), between steps and never inside `forward`: there is no hidden state, so
going on from a checkpoint is exact.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor
from torch.optim import Optimizer

from lora_cli.recipe.schema import TrainRecipe

if TYPE_CHECKING:
    from lora_cli.adapter.inject import Adapter
    from lora_cli.data.example import Batch


class Run(Protocol):
    """What a lifecycle sees of the training."""

    adapter: "Adapter"
    optimizer: Optimizer
    train: TrainRecipe
    step: int
    """Optimizer steps done."""

    @property
    def total_steps(self) -> int:
        """Of the whole run."""
        ...

    @property
    def tokens(self) -> int:
        """Read in the step at hand by all processes, padding not counted."""
        ...

    @property
    def trained_tokens(self) -> int:
        """Learned in the step at hand, by all processes."""
        ...

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Sum over the processes, in place."""
        ...

    def measure(self, kind: str) -> dict[str, Tensor]:
        """Layer -> `inputs` or `gradients`, measured on the rows of the next step."""
        ...

    def held_out_loss(self) -> Tensor:
        """The mean loss per trained token on what `held_out` keeps from the next step; a scalar, nothing is dropped."""
        ...

    def say(self, text: str, /) -> None:
        """Tell whoever watches what takes long."""
        ...

    def second_passes(self) -> Callable[["Batch"], Tensor]:
        """Watch the passes from now on; what comes back takes one more through a micro-batch that was just computed.

        It says how far apart what the two predict is: ½·(KL(p‖q) + KL(q‖p)), summed over the trained tokens. Only the
        first pass has a gradient.
        """
        ...


class Lifecycle:
    """Hooks, in the order in which they are called."""

    rehearsable = True
    """False where `lora estimate` cannot take its steps: they need numbers, or no one of them is like the others."""

    def looks(self, run: Run, examples: int) -> Mapping[str, float]:
        """Rows that a run of `total_steps` reads beside its steps, by what for: `loss`, or a kind of `Run.measure`."""
        return {}

    def later(self, run: Run) -> float:
        """Bytes that it comes to keep between steps, at most, beside what it has before the first."""
        return 0.0

    def backward(self, run: Run) -> tuple[float, float]:
        """Shares of the residual branches that have a backward pass: on average, and in the step where most have."""
        return 1.0, 1.0

    def setup(self, run: Run) -> None:
        """Once, before the first step or before a checkpoint is restored."""

    def rate(self, step: int) -> float:
        """Factor on the learning rate of step 0, 1, ..."""
        return 1.0

    def held_out(self, examples: int, step: int) -> int:
        """How many of the training examples step 0, 1, ... does not learn from; they are drawn by lot, once."""
        return 0

    def outer(self, run: Run) -> Collection[str]:
        """Names of trained tensors that learn from what is held out in the step at hand, and from nothing else.

        Both are gradients at the same point: the first-order form of a bi-level problem.
        """
        return ()

    def begin_step(self, run: Run) -> None:
        """Before the first micro-batch of a step, or of its held-out rows; again where memory was short."""

    def loss(self, run: Run, batch: "Batch") -> Tensor | None:
        """Added to the loss of a micro-batch that has just been computed: its share of a sum over the whole step.

        A step has to be the same however it is split, so this has to be a sum over tokens or documents, divided by
        what the whole step has of them.
        """
        return None

    def penalty(self, run: Run) -> Tensor | None:
        """Added to the loss, once per optimizer step."""
        return None

    def gradients(self, run: Run) -> None:
        """After the last backward pass of a step, before clipping."""

    def stepped(self, run: Run) -> None:
        """After the optimizer's step; `run.step` counts it."""

    def finish(self, run: Run) -> None:
        """After the last step, before the adapter is saved."""

    def state(self) -> dict[str, Tensor]:
        """What has to be in a checkpoint."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Put back what `state` gave."""
