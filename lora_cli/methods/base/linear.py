"""linear: torch.nn.Linear, stored as [out, in]."""

import torch
from torch import Tensor, nn

from lora_cli.adapter.base import Base
from lora_cli.adapter.fused import narrow

wraps = nn.Linear


def fits(module: nn.Linear) -> bool:
    """Whether it computes a product and nothing else: some routers of transformers are a Linear that returns more."""
    if type(module).forward is nn.Linear.forward:
        return True
    weights = {name: torch.empty_like(tensor, device="meta") for name, tensor in module.named_parameters()}
    x = torch.empty(1, module.in_features, dtype=module.weight.dtype, device="meta")
    try:
        y = torch.func.functional_call(module, weights, x)
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        return False
    return isinstance(y, Tensor) and y.shape == (1, module.out_features)


class View(Base):
    """W0 of an nn.Linear."""

    project = staticmethod(narrow)

    def __init__(self, module: nn.Linear) -> None:
        """Look at `module`; nothing is copied."""
        self.module = module
        self.in_features, self.out_features = module.in_features, module.out_features

    @property
    def bias(self) -> Tensor | None:
        """The module's own."""
        return self.module.bias

    @property
    def dense(self) -> Tensor | None:
        """The weight; a subclass may keep it in another way."""
        weight = self.module.weight
        return None if type(self.module) is not nn.Linear or weight.requires_grad else weight

    def replaced(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """A new nn.Linear."""
        linear = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad=False)
        return linear
