"""The blocks of a transformer, which are recomputed, shared out, or passed by one at a time."""

from torch import nn


def blocks(model: nn.Module) -> list[nn.Module]:
    """From the bottom: what is in the longest list of modules that lies in no other."""
    lists = {name: each for name, each in model.named_modules() if isinstance(each, nn.ModuleList)}
    outer = [each for name, each in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    return list(max(outer, key=len, default=nn.ModuleList()))
