"""adamw: Adam with decoupled weight decay. arXiv:1711.05101

Fused into one kernel where the device has it.
"""

from typing import Any

from torch.optim import AdamW, Optimizer

from lora_cli.recipe.schema import TrainRecipe


def make(groups: list[dict[str, Any]], train: TrainRecipe, adapter: object) -> Optimizer:
    """AdamW over `groups`, each with its own learning rate and weight decay."""
    device = groups[0]["params"][0].device.type
    return AdamW(groups, lr=train.learning_rate, betas=train.betas, fused=device in ("cuda", "cpu"))
