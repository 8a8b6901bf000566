"""sgd: W ← W − η·G, nothing remembered between steps.

For methods whose parameters mean something else after every step, so that averages over steps would mix different
things. Wants a far larger learning rate than Adam, and loss scales with it: begin at 0.1 to 1.
"""

from typing import Any

from torch.optim import SGD, Optimizer

from lora_cli.recipe.schema import TrainRecipe

forbids = {"train.betas": "it remembers nothing from which it could take moments"}


def make(groups: list[dict[str, Any]], train: TrainRecipe, adapter: object) -> Optimizer:
    """Without momentum."""
    return SGD(groups, lr=train.learning_rate)
