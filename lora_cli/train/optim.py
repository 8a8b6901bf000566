"""Parameter groups, the learning rate, and what the optimizer remembers."""

import math
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lora_cli import parts
from lora_cli.adapter.inject import Adapter
from lora_cli.recipe.schema import TrainRecipe


def make(adapter: Adapter, train: TrainRecipe) -> Optimizer:
    """The method's optimizer over every trainable tensor, each in exactly one group.

    Vectors (biases, norms, magnitudes) are not decayed: pulling them to zero has no meaning.
    """
    named = adapter.trainable()
    kinds = (
        ({name: p for name, p in named.items() if p.ndim > 1}, train.weight_decay),
        ({name: p for name, p in named.items() if p.ndim <= 1}, 0.0),
    )
    groups: list[dict[str, Any]] = [
        {"params": list(tensors.values()), "names": list(tensors), "weight_decay": decay}
        for tensors, decay in kinds
        if tensors
    ]
    part = adapter.plan.method.optimizer
    return parts.load("optimizer", part.name).make(
        groups, train, adapter, **parts.settings("optimizer", part)
    )


def learning_rate(step: int, total_steps: int, train: TrainRecipe) -> float:
    """The rate of step 0, 1, ... total_steps − 1.

    It rises linearly over the warm-up and is never 0 on the way: neither the first step nor the last is wasted.
    """
    warmup = warmup_steps(total_steps, train)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(total_steps - warmup, 1)
    course = {
        "constant": 1.0,
        "linear": 1 - done,
        "cosine": (1 + math.cos(math.pi * done)) / 2,
        "inverse_sqrt": math.sqrt(max(warmup, 1) / (max(warmup, 1) + step - warmup)),
    }[train.lr_scheduler]
    return train.min_learning_rate + (train.learning_rate - train.min_learning_rate) * course


def warmup_steps(total_steps: int, train: TrainRecipe) -> int:
    """Length of the warm-up in steps."""
    if train.warmup_steps is not None:
        return train.warmup_steps
    return round((train.warmup_ratio or 0.0) * total_steps)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Give every group the rate, times its `lr_ratio` if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_ratio", 1.0)


def named_state(optimizer: Optimizer, trainable: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's tensors, `<parameter>|<key>`, for a checkpoint."""
    return {
        f"{name}|{key}": value.detach()
        for name, parameter in trainable.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_state(
    optimizer: Optimizer, trainable: dict[str, nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    """Put back what `named_state` gave, through the optimizer's own `load_state_dict`."""
    states: dict[str, dict[str, Tensor]] = {}
    for joined, value in tensors.items():
        name, _, key = joined.rpartition("|")
        states.setdefault(name, {})[key] = value
    names = {id(parameter): name for name, parameter in trainable.items()}
    ordered = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    saved = optimizer.state_dict()
    saved["state"] = {index: states[name] for index, name in enumerate(ordered) if name in states}
    optimizer.load_state_dict(saved)
