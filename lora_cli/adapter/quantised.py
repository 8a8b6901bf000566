"""Quantised: a linear layer whose W0 is kept in few bits, and the view of it. The files of `methods/base/` say how.

Some starts take a low-rank part F off W0 before it is quantised (PiSSA, LoftQ): Q = q(W0 + F), F being minus that
part. The layer then stands for W0' = dq(Q) − F, what training starts from, and ΔW has F among its factors: in their
sum F cancels, and is not computed. q(W0 + F) follows from the base's files and F alone, so an adapter that keeps F's
factors finds its base again to the bit.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from lora_cli.adapter.base import SIGNS, Base, signs
from lora_cli.adapter.fused import narrow
from lora_cli.errors import ExitCode, UserError

GROUP = 32
"""Inputs that share a scale and a zero point, in formats that have such."""
BYTE = torch.float8_e4m3fn
"""What integers are viewed as where they are shared out: `fully_shard` takes floats only (PyTorch before 2.13). Bytes
of this type are moved, never computed with."""


class Quantised(nn.Module, ABC):
    """y = W0'·x + b. A subclass keeps the codes in buffers, and multiplies them out."""

    bias: nn.Parameter | None

    def __init__(self, plain: Base) -> None:
        """Empty codes in the place of a plain layer: its shapes, its bias, its kind, but not its weight."""
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.bias = plain.module.bias
        self.dtype = plain.dtype
        self.plain = _emptied(plain)
        self.taken: tuple[Tensor, Tensor] | None = None
        self.integers: dict[str, torch.dtype] = {}

    def codes_as_parameters(self) -> None:
        """Let all that has rows to share out be frozen parameters, byte for byte."""
        for name, buffer in [*self.named_buffers()]:
            if name == SIGNS or not buffer.ndim:
                continue
            delattr(self, name)
            if not buffer.is_floating_point():
                self.integers[name], buffer = buffer.dtype, buffer.view(BYTE)
            self.register_parameter(name, nn.Parameter(buffer, requires_grad=False))

    def kept(self) -> dict[str, Tensor]:
        """The codes and all that belongs to them."""
        tensors = [*self.named_parameters(), *self.named_buffers()]
        return {name: tensor for name, tensor in tensors if name not in ("bias", SIGNS)}

    def read(self, name: str) -> Tensor:
        """Something of it, as it was kept; where it is shared out, all processes have to ask for it together."""
        kept: Tensor = getattr(self, name)
        if name in self.integers:
            kept = kept.view(self.integers[name])
        return kept.full_tensor() if isinstance(kept, DTensor) else kept

    @abstractmethod
    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """Multiply the codes out: dq(Q) [out, in]."""

    def forward(self, x: Tensor) -> Tensor:
        """W0'·x + b."""
        y = self.without_taken(x)
        if self.taken is None:
            return y
        B, A = (factor.to(y.dtype) for factor in self.taken)
        return y - F.linear(F.linear(x.to(y.dtype), A), B)

    def without_taken(self, x: Tensor) -> Tensor:
        """dq(Q)·x + b."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(device, enabled=False):
            return _apply(x.to(dtype), bias, self)

    @property
    def weight(self) -> Tensor:
        """W0' for model code that asks; computed anew each time."""
        return View(self).weight().to(self.dtype)


class Readable(Quantised):
    """One whose codes others store in files."""

    named: ClassVar[str] = "weight"
    """What its codes are called there, behind the name of the layer."""
    beside: ClassVar[tuple[str, ...]]
    """What the names of what belongs to them begin with. Where there is nothing of it, there are no codes."""

    @abstractmethod
    def unpack(self, saved: Mapping[str, Tensor], stored: Mapping[str, Any]) -> None:
        """Take over what was saved of a layer.

        Args:
            saved: tensors by their names in the layer.
            stored: what the config says of the codes of all layers.

        Raises:
            KeyError: with the name of a tensor that is missing.
            ValueError: those are no codes for a layer of this shape.
        """


class _Product(torch.autograd.Function):
    """Keeps nothing for the backward pass: the codes are multiplied out a second time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: Quantised) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.layer = layer
        return F.linear(x, layer.dequantised(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        of_x, of_bias, _ = ctx.needs_input_grad
        dx = dY @ ctx.layer.dequantised(dY.dtype) if of_x else None
        return dx, dY.reshape(-1, dY.shape[-1]).sum(0) if of_bias else None, None


_apply: Any = _Product.apply


class View(Base):
    """W0' of a quantised layer."""

    project = staticmethod(narrow)

    def __init__(self, module: Quantised) -> None:
        """Look at `module`; nothing is copied."""
        self.module = module
        self.in_features, self.out_features = module.in_features, module.out_features
        self.taken = module.taken

    @property
    def bias(self) -> Tensor | None:
        """The module's own."""
        return self.module.bias

    @property
    def device(self) -> torch.device:
        """Where its codes are."""
        return next(iter(self.module.kept().values())).device

    @property
    def dtype(self) -> torch.dtype:
        """What the weight had been stored in."""
        return self.module.dtype

    def weight(self) -> Tensor:
        """dq(Q) − F, float32 [out, in]."""
        W = self.module.dequantised(torch.float32)
        return W if self.taken is None else W - self.taken[0] @ self.taken[1]

    def through(self, A: Tensor) -> Tensor:
        """A·W0'ᵀ, float32 [r, out]."""
        return F.linear(A.float(), self.weight())

    def signs(self) -> Tensor:
        """Those of the weights before they were quantised, where these were known."""
        noted = dict(self.module.named_buffers(recurse=False)).get(SIGNS)
        return signs(self.module.plain.oriented(self.weight())) if noted is None else noted

    def without_taken(self, x: Tensor) -> Tensor:
        """dq(Q)·x + b."""
        return self.module.without_taken(x)

    def set_weight(self, W: Tensor) -> NoReturn:
        """Never: what is added in small steps would be lost in every rounding.

        Raises:
            UserError: always.
        """
        what = "a quantised weight cannot be written to: small changes would be rounded away"
        raise UserError(what, where="model.quantize", fix="leave it out", code=ExitCode.MODEL)

    def replaced(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """A new plain layer of the kind that was quantised."""
        return self.module.plain.replaced(weight, bias)


def _emptied(plain: Base) -> Base:
    """A view of a layer of the same kind and shape that has no numbers."""
    weight = torch.empty(plain.out_features, plain.in_features, device="meta")
    bias = None if plain.bias is None else torch.empty(plain.out_features, device="meta")
    return type(plain)(plain.replaced(weight, bias))  # pyright: ignore[reportCallIssue]


def remainder(W0: Tensor, taken: tuple[Tensor, Tensor] | None) -> Tensor:
    """W0 + B·A, float32 [out, in] on the CPU, where every machine rounds alike: summed in float64, cast once."""
    W0 = W0.cpu()
    if taken is None:
        return W0
    B, A = (factor.detach().cpu().double() for factor in taken)
    return (W0.double() + B @ A).float()


def digest(model: nn.Module) -> str | None:
    """A hash over all codes of a model; None where nothing is quantised."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Quantised)}
    return digest_of({name: layer_digest(layer) for name, layer in layers.items()})


def digest_of(layers: Mapping[str, str]) -> str | None:
    """The same of layers that were never in memory together: name -> `layer_digest`, in any order."""
    lines = (f"{name} {found}\n" for name, found in sorted(layers.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:32] if layers else None


def layer_digest(layer: Quantised) -> str:
    """A hash over the codes of one layer."""
    found = hashlib.sha256()
    for key in layer.kept():
        codes = layer.read(key)
        found.update(f"{key}:{tuple(codes.shape)}".encode())
        found.update(codes.cpu().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
