"""conv1d: the Conv1D of GPT-2 in transformers, a linear layer stored as [in, out]."""

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_cli.adapter.base import Base
from lora_cli.adapter.fused import narrow

wraps = Conv1D


class View(Base):
    """W0 of a Conv1D: its weight transposed."""

    project = staticmethod(narrow)

    def __init__(self, module: Conv1D) -> None:
        """Look at `module`; nothing is copied."""
        self.module = module
        self.in_features, self.out_features = module.weight.shape

    @property
    def bias(self) -> Tensor | None:
        """A Conv1D always has one."""
        return self.module.bias

    def oriented(self, stored: Tensor) -> Tensor:
        """Transposed."""
        return stored.t()

    @property
    def dense(self) -> Tensor | None:
        """The weight, transposed; a subclass may keep it in another way."""
        weight = self.module.weight
        return None if type(self.module) is not Conv1D or weight.requires_grad else weight.t()

    def replaced(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """A new Conv1D."""
        conv = Conv1D(self.out_features, self.in_features)
        conv.weight = nn.Parameter(weight.t().contiguous(), requires_grad=False)
        assert bias is not None, "a Conv1D always has a bias"
        conv.bias = nn.Parameter(bias, requires_grad=False)
        return conv
