"""expert: one matrix of one expert of a mixture, a slice of a fused tensor; see `model.split_experts`."""

from torch import Tensor, nn
from torch.nn import functional as F

from lora_cli.adapter.base import Base
from lora_cli.adapter.fused import narrow


class ExpertLinear(nn.Module):
    """A linear layer around a weight [out, in] that belongs to a larger tensor."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Nothing is copied."""
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """W·x + b."""
        return F.linear(x, self.weight, self.bias)


wraps = ExpertLinear


class View(Base):
    """W0 of one matrix of one expert."""

    project = staticmethod(narrow)

    def __init__(self, module: ExpertLinear) -> None:
        """Look at `module`; nothing is copied."""
        self.module = module
        self.out_features, self.in_features = module.weight.shape

    @property
    def bias(self) -> Tensor | None:
        """The module's own."""
        return self.module.bias

    @property
    def dense(self) -> Tensor | None:
        """The weight."""
        weight = self.module.weight
        return None if weight.requires_grad else weight

    def replaced(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """Another one."""
        return ExpertLinear(weight, bias)
