"""What does not learn any more: entries that are held at zero, and whole tensors that are frozen."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@torch.no_grad()
def close(parameter: nn.Parameter, kept: Tensor, optimizer: Optimizer) -> None:
    """Zero every entry but those of `kept`, and what the optimizer remembers of them.

    As long as no gradient reaches them (`hold`), no optimizer moves them again.

    Args:
        parameter: of any shape.
        kept: of its shape, or one that broadcasts to it; true where the entry stays.
        optimizer: that of the run.
    """
    gone = ~kept.expand_as(parameter)
    remembered = [
        each for each in optimizer.state.get(parameter, {}).values() if each.shape == parameter.shape
    ]
    for tensor in (parameter, *remembered):
        tensor.masked_fill_(gone, 0)


def hold(named: Mapping[str, nn.Parameter], kept: Mapping[str, Tensor]) -> None:
    """Let no gradient reach the entries that `kept` leaves out."""
    for name, mask in kept.items():
        gradient = named[name].grad
        if gradient is not None:
            gradient.masked_fill_(~mask.expand_as(gradient), 0)


def freeze(parameters: Collection[nn.Parameter], optimizer: Optimizer) -> None:
    """Stop training these tensors: no gradient is computed, and the optimizer has neither them nor memories of them."""
    gone = {id(parameter) for parameter in parameters}
    for group in optimizer.param_groups:
        left = [place for place, parameter in enumerate(group["params"]) if id(parameter) not in gone]
        for key in ("params", "names"):
            group[key] = [group[key][place] for place in left]
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
        optimizer.state.pop(parameter, None)
