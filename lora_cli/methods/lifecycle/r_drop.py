"""r_drop: two passes, each with a dropout of its own, should predict the same. arXiv:2106.14448

Adds weight·½·(KL(p‖q) + KL(q‖p)) to the loss, averaged over the trained tokens: p is what the pass of the loss
predicts, q what one more pass does. As in HiddenKey (arXiv:2403.00812), which has it from R-Drop, the gradient goes
through the first pass only: about half a step's time more, and no more memory for activations. As p and q are drawn
alike, that is on average half of the gradient through both. Works with any method that drops something, by `dropout:
0.1` or `attention: key_drop`. The papers tune the weight for each task.
"""

from typing import TYPE_CHECKING, Annotated

from pydantic import Field
from torch import Tensor

from lora_cli.adapter.lifecycle import Lifecycle, Run
from lora_cli.recipe.schema import Section

if TYPE_CHECKING:
    from lora_cli.data.example import Batch

needs = {"something that drops": "else two passes predict the same"}
forbids = {
    "lifecycle.load_balance": "it counts what a router decides in one pass, and would be shown the second",
}


class Settings(Section):
    """Settings in a recipe: `{r_drop: {weight: 1}}`."""

    weight: Annotated[float, Field(gt=0)] = Field(
        default=1.0,
        description="Of the divergence between two passes in the loss, both in nats a trained token.",
    )


class RDrop(Lifecycle):
    """Nothing to remember: dropout follows from (seed, step, micro-batch), that of the second pass too."""

    def __init__(self, weight: float) -> None:
        """As in a recipe."""
        self.weight = weight

    def setup(self, run: Run) -> None:
        """Watch the first passes."""
        self.divergence = run.second_passes()

    def loss(self, run: Run, batch: "Batch") -> Tensor:
        """The share of this micro-batch."""
        return self.weight * self.divergence(batch) / run.trained_tokens


make = RDrop
