"""convolution: torch.nn.Conv2d and Conv3d, for which A is a convolution, and B one with a kernel of 1. arXiv:2106.09685

W0 is the matrix [out, in] that meets every patch of x, with in = channels · size of the kernel. They are no part of
`all-linear`. Convolutions in groups are left alone: those are several matrices, one a group.
"""

import copy

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lora_cli.adapter.base import Base

wraps = _ConvNd


def fits(module: _ConvNd) -> bool:
    """Whether it is one matrix. A Conv1d is left alone, because state space models read its weight past the module."""
    return isinstance(module, nn.Conv2d | nn.Conv3d) and module.groups == 1


class View(Base):
    """W0 of a Conv2d or Conv3d."""

    def __init__(self, module: nn.Conv2d | nn.Conv3d) -> None:
        """Look at `module`; nothing is copied."""
        self.module = module
        self.out_features, self.in_features = module.out_channels, module.weight[0].numel()
        self.channels = 1 - module.weight.ndim

    @property
    def bias(self) -> Tensor | None:
        """The module's own."""
        return self.module.bias

    def __call__(self, x: Tensor) -> Tensor:
        """W0·x + b0, the channels last."""
        return self.module(x).movedim(self.channels, -1)

    def project(self, x: Tensor, A: Tensor) -> Tensor:
        """Convolve with the rows of A, with the module's own stride, padding and dilation."""
        return self.module._conv_forward(x, self._kernels(A), None).movedim(self.channels, -1)

    def oriented(self, stored: Tensor) -> Tensor:
        """Kernels flattened, or given their shape again."""
        return self._kernels(stored) if stored.ndim == 2 else stored.flatten(1)

    def as_stored(self, key: str, tensor: Tensor) -> Tensor:
        """A with the shape of the kernel, B with a kernel of 1; DoRA's lengths as channels."""
        ones = (1,) * (self.module.weight.ndim - 2)
        if key == "A":
            return self._kernels(tensor)
        shapes = {"B": (*tensor.shape, *ones), "magnitude": (1, -1, *ones)}
        return tensor.reshape(shapes[key]) if key in shapes else tensor

    def _kernels(self, rows: Tensor) -> Tensor:
        return rows.reshape(-1, *self.module.weight.shape[1:])

    def replaced(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """The same kind of convolution, other values."""
        convolution = copy.copy(self.module)
        convolution._parameters = dict(self.module._parameters)
        convolution.weight = nn.Parameter(self._kernels(weight), requires_grad=False)
        if bias is not None:
            convolution.bias = nn.Parameter(bias, requires_grad=False)
        return convolution
