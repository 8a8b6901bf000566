"""Norms and gated activations in one kernel each on a GPU, both ways: those of liger-kernel. arXiv:2410.10989

What transformers computes in several kernels reads and writes every activation several times, and keeps more of them.
A module is not known by its name: it is replaced where its forward, tried on numbers, gives the very bits of a formula
of this file, and where liger's kernel, tried on this device, gives that formula to rounding. Parameters keep their
names and stay what they are. Rotary embeddings are left alone: transformers applies them by functions of its modules,
which could only be exchanged for every model of the process.

The kernels add up in a fixed order, so the same run gives the same bits. Tested on CPUs in Triton's interpreter; this
has not run on a GPU yet.
"""

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version
from torch.nn import functional as F

from lora_cli.adapter.again import again

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Types that kernels compute in, and how far one may be from its formula there: ‖difference‖ / ‖formula‖."""
WIDEST = 65536
"""Numbers in a row that one program of a kernel takes."""
TRIED = 192
"""Width of an MLP that a kernel is tried out on."""


class UnfitError(Exception):
    """Liger's kernels do not compute here what they should; the message says which, and what happened."""


def serve(device: torch.device) -> bool:
    """Whether there are kernels for this device."""
    return device.type == "cuda" and all(find_spec(name) is not None for name in ("liger_kernel", "triton"))


def use(model: nn.Module, device: torch.device, precision: torch.dtype) -> int:
    """Let kernels compute what they can of a model, in place; returns how many of its modules.

    Args:
        model: with its adapter, before its parameters are shared out.
        device: what it will compute on.
        precision: what it will compute in.

    Raises:
        UnfitError: a kernel fails, or gives something else; the model is as it was.
    """
    found = {name: _fused(module, device.type) for name, module in model.named_modules()}
    fused = {name: module for name, module in found.items() if module is not None}
    for operation, width, dtype in {module.trial(precision) for module in fused.values()}:
        operation.try_out(width, dtype)
    for name, module in fused.items():
        model.set_submodule(name, module.train(model.training))
    return len(fused)


# Formulas, and the kernels for them


@dataclass(frozen=True)
class Operation(ABC):
    """A formula, by a kernel where that serves. The last axis of a tensor is the one that it is about."""

    device: str
    """Type of the one that the kernel runs on."""

    @abstractmethod
    def plain(self, *tensors: Tensor) -> Tensor:
        """The formula, as transformers computes it."""

    @abstractmethod
    def kernel(self, *tensors: Tensor) -> Tensor:
        """The same by liger-kernel."""

    @abstractmethod
    def shapes(self, width: int) -> tuple[tuple[int, ...], ...]:
        """Of tensors to try it out on."""

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The one or the other."""
        return self.kernel(*tensors) if self.serves(*tensors) else self.plain(*tensors)

    def serves(self, first: Tensor, *others: Tensor) -> bool:
        """Whether the kernel computes this."""
        return (
            first.device.type == self.device
            and first.dtype in ROUNDING
            and all(each.dtype is first.dtype for each in others)
            and 0 < first.shape[-1] <= WIDEST
            and first.numel() > 0
        )

    def try_out(self, width: int, dtype: torch.dtype) -> None:
        """Compare kernel and formula, value and gradients, on random numbers.

        Raises:
            UnfitError: they differ by more than rounding, or the kernel fails.
        """
        generator, name = torch.Generator().manual_seed(0), type(self).__name__
        drawn = [torch.randn(shape, generator=generator) for shape in self.shapes(width)]
        try:
            kernel, plain = (
                _value_and_gradients(
                    each, [t.to(self.device, dtype, copy=True).requires_grad_() for t in drawn]
                )
                for each in (self.kernel, self.plain)
            )
        except Exception as error:  # a compiler, a driver and a library, which all fail in their own way
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UnfitError(f"{name}: {reason}") from error
        off = max(float((ours - its).norm() / its.norm()) for ours, its in zip(kernel, plain, strict=True))
        if not off <= ROUNDING[dtype]:
            raise UnfitError(f"{name} in {str(dtype).removeprefix('torch.')} is off by {off:.1e}")


def _value_and_gradients(formula: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    y = formula(*tensors)
    weights = torch.linspace(-1, 2, y.numel()).view_as(y).to(y)
    return [each.float() for each in (y.detach(), *torch.autograd.grad(y, tensors, weights))]


@dataclass(frozen=True)
class RMSNorm(Operation):
    """x / √(mean x² + eps) · (offset + weight), of x [..., width] and weight [width]. arXiv:1910.07467"""

    eps: float
    offset: float
    """1 in models whose weights are around zero."""
    wide: bool
    """Whether the product with the weights is in float32 too, as Gemma computes it, or in x's own type, as Llama."""

    def plain(self, *tensors: Tensor) -> Tensor:
        """As transformers computes it."""
        x, weight = tensors
        z = x.float()
        z = z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.wide:
            return (z * (self.offset + weight.float())).to(x.dtype)
        return (self.offset + weight) * z.to(x.dtype)

    def kernel(self, *tensors: Tensor) -> Tensor:
        """Never in place: it would write over the gradient of the residual stream."""
        casting = "gemma" if self.wide else "llama"
        function = import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
        return function.apply(*tensors, self.eps, self.offset, casting, False)

    def serves(self, first: Tensor, *others: Tensor) -> bool:
        """A wide one takes x in another type than the weights, which train in float32."""
        return super().serves(first, *(() if self.wide else others))

    def shapes(self, width: int) -> tuple[tuple[int, ...], ...]:
        """Of x and weight."""
        return (3, 5, width), (width,)


@dataclass(frozen=True)
class SwiGLU(Operation):
    """silu(gate) · up. arXiv:2002.05202"""

    reads: ClassVar = ("gate_proj", "up_proj")

    def plain(self, *tensors: Tensor) -> Tensor:
        """As transformers computes it."""
        gate, up = tensors
        return F.silu(gate) * up

    def kernel(self, *tensors: Tensor) -> Tensor:
        """With gradients in the place of what was kept."""
        ops = import_module("liger_kernel.ops.swiglu")
        return _apply(*tensors, ops.swiglu_forward, ops.swiglu_backward)

    def shapes(self, width: int) -> tuple[tuple[int, ...], ...]:
        """Of what is read."""
        return ((3, 5, width),) * len(self.reads)


@dataclass(frozen=True)
class GeGLU(SwiGLU):
    """gelu(gate) · up, by the approximation with tanh."""

    def plain(self, *tensors: Tensor) -> Tensor:
        """As transformers computes it."""
        gate, up = tensors
        return F.gelu(gate, approximate="tanh") * up

    def kernel(self, *tensors: Tensor) -> Tensor:
        """With gradients in the place of what was kept."""
        ops = import_module("liger_kernel.ops.geglu")
        return _apply(*tensors, ops.geglu_forward, ops.geglu_backward)


@dataclass(frozen=True)
class JoinedSwiGLU(SwiGLU):
    """The same, where one layer makes gate and up, one behind the other."""

    reads: ClassVar = ("gate_up_proj",)

    def plain(self, *tensors: Tensor) -> Tensor:
        """As transformers computes it."""
        gate, up = tensors[0].chunk(2, -1)
        return F.silu(gate) * up

    def kernel(self, *tensors: Tensor) -> Tensor:
        """With gradients in a place of their own; they come as rows, so it has to be given rows."""
        (gate_up,) = tensors
        function = import_module("liger_kernel.ops.swiglu").LigerFusedGateUpSiLUMulFunction
        return function.apply(gate_up.flatten(0, -2), False).unflatten(0, gate_up.shape[:-1])


class _Gated(torch.autograd.Function):
    """The kernels write the gradients over what was kept."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gate: Tensor, up: Tensor, forward: Callable[..., Any], backward: Callable[..., Any]
    ) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.kernel = backward
        ctx.save_for_backward(gate, up)
        return forward(gate, up)[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        # Triton writes unseen: who kept the same tensors is to get an error, not gradients in their place.
        increment_version(gate)
        increment_version(up)
        return *ctx.kernel(gate.detach(), up.detach(), d.contiguous()), None, None


_apply: Any = _Gated.apply


# The modules that compute them


class FusedRMSNorm(nn.Module):
    """A norm, with the weight of the one that it stands for."""

    def __init__(self, weight: nn.Parameter, operation: RMSNorm) -> None:
        """Nothing is copied."""
        super().__init__()
        self.weight = weight
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same."""
        return self.operation(x, self.weight)

    def trial(self, precision: torch.dtype) -> tuple[Operation, int, torch.dtype]:
        """What has to be tried out, how wide, and in which type."""
        return self.operation, self.weight.shape[0], self.weight.dtype


class FusedMLP(nn.Module):
    """A gated MLP, with the layers of the one that it stands for."""

    def __init__(self, mlp: nn.Module, operation: SwiGLU) -> None:
        """Nothing is copied."""
        super().__init__()
        for name, child in mlp.named_children():
            self.add_module(name, child)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> the same."""
        read = (self.get_submodule(name)(x) for name in self.operation.reads)
        return self.get_submodule("down_proj")(again(self.operation, *read))

    def trial(self, precision: torch.dtype) -> tuple[Operation, int, torch.dtype]:
        """As above."""
        return self.operation, TRIED, precision


# Which module computes what


def _fused(module: nn.Module, device: str) -> FusedRMSNorm | FusedMLP | None:
    """What can stand for a module; None where it computes something else."""
    if "weight" in module._parameters:
        return _fused_norm(module, device)
    return _fused_mlp(module, device)


def _fused_norm(module: nn.Module, device: str) -> FusedRMSNorm | None:
    weight = module._parameters["weight"]
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    more = len(module._parameters) > 1 or module._buffers or module._modules
    if weight is None or weight.ndim != 1 or more or not isinstance(eps, float):
        return None
    if len(inspect.signature(module.forward).parameters) != 1:
        return None
    kinds = (RMSNorm(device, eps, offset, wide) for offset, wide in ((0.0, False), (1.0, True), (0.0, True)))
    return next((FusedRMSNorm(weight, each) for each in kinds if _norms(module, each, len(weight))), None)


def _norms(module: nn.Module, operation: RMSNorm, width: int) -> bool:
    """Whether they give the same bits, whatever types x and weights have."""
    generator = torch.Generator().manual_seed(0)
    x, weight = 3 * torch.randn(7, width, generator=generator), torch.randn(width, generator=generator)
    for given in ROUNDING:
        for kept in ROUNDING:
            own = nn.Parameter(weight.to(kept), requires_grad=False)
            trial = copy.copy(module)
            trial._parameters = {"weight": own}
            if not _gives(trial, x.to(given), operation.plain(x.to(given), own)):
                return False
    return True


def _fused_mlp(module: nn.Module, device: str) -> FusedMLP | None:
    if module._parameters or module._buffers:
        return None
    kinds = (kind(device) for kind in (SwiGLU, GeGLU, JoinedSwiGLU))
    return next((FusedMLP(module, each) for each in kinds if _gates(module, each)), None)


def _gates(module: nn.Module, operation: SwiGLU) -> bool:
    """Whether they give the same bits, with small layers in the place of the module's own."""
    layers, inner = (*operation.reads, "down_proj"), 24
    if len(module._modules.keys() - {*layers}) != 1:  # what is left is the activation
        return False
    generator = torch.Generator().manual_seed(0)
    read = {name: _linear(8, 2 * inner // len(operation.reads), generator) for name in operation.reads}
    down = _linear(inner, 32, generator)
    trial = copy.copy(module)
    trial._modules = {**module._modules, **read, "down_proj": down}
    # Far from zero too, where some models cut off what is large.
    x = torch.randn(64, 8, generator=generator) * torch.logspace(-1, 3, 64)[:, None]
    expected = down(operation.plain(*(layer(x) for layer in read.values())))
    for training in (True, False):
        trial.training = training
        if not _gives(trial, x, expected):
            return False
    return True


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Module:
    layer: Any = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False)
    layer.weight = nn.Parameter(torch.randn(outputs, inputs, generator=generator), requires_grad=False)
    return layer


def _gives(module: nn.Module, x: Tensor, expected: Tensor) -> bool:
    try:
        y = module(x)
    except Exception:  # foreign code, called in a way that it may not be made for
        return False
    return isinstance(y, Tensor) and y.dtype is expected.dtype and torch.equal(y, expected)
