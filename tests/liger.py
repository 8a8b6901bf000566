"""Stands in for liger-kernel where that cannot run: its functions in plain PyTorch, with all that they write to."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lora_cli import kernels


class LigerRMSNormFunction(torch.autograd.Function):
    """Keeps x and w, and computes in float32; gives w a gradient where one is wanted."""

    @staticmethod
    def forward(ctx, X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
        assert casting_mode in ("llama", "gemma")
        assert not in_place
        ctx.save_for_backward(X, W)
        ctx.settings = eps, offset
        z = X.float() * torch.rsqrt(X.float().square().mean(-1, keepdim=True) + eps)
        if casting_mode == "llama":
            return ((offset + W) * z.to(X.dtype)).to(X.dtype)
        return (z * (offset + W.float())).to(X.dtype)

    @staticmethod
    def backward(ctx, dY):
        (X, W), (eps, offset) = ctx.saved_tensors, ctx.settings
        x, d = X.float(), dY.float()
        inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        m = d * (offset + W.float())
        dX = inverse * (m - x * inverse.square() * (m * x).mean(-1, keepdim=True))
        dW = (d * x * inverse).flatten(0, -2).sum(0).to(W.dtype) if ctx.needs_input_grad[1] else None
        return dX.to(X.dtype), dW, None, None, None, None, None


def _gated(activation):
    def forward(a, b):
        assert a.is_contiguous()
        assert b.is_contiguous()
        return a.flatten(0, -2), b.flatten(0, -2), (activation(a.float()).to(b.dtype) * b)

    def backward(a, b, dc):
        with torch.enable_grad():
            gate, up = (t.detach().float().requires_grad_() for t in (a, b))
            made = torch.autograd.grad(activation(gate) * up, (gate, up), dc.float())
        for kept, gradient in zip((a, b), made, strict=True):
            kept.data.copy_(gradient)  # unseen by autograd, as Triton writes
        return a.view(dc.shape), b.view(dc.shape)

    return forward, backward


swiglu_forward, swiglu_backward = _gated(F.silu)
geglu_forward, geglu_backward = _gated(lambda x: F.gelu(x, approximate="tanh"))


class LigerFusedGateUpSiLUMulFunction(torch.autograd.Function):
    """Of rows."""

    @staticmethod
    def forward(ctx, y, in_place=False):
        assert y.ndim == 2
        assert not in_place
        ctx.save_for_backward(y)
        gate, up = (t.contiguous() for t in y.chunk(2, -1))
        return swiglu_forward(gate, up)[-1]

    @staticmethod
    def backward(ctx, dc):
        gate, up = (t.clone() for t in ctx.saved_tensors[0].chunk(2, -1))
        return torch.cat(swiglu_backward(gate, up, dc.contiguous()), -1), None


MODULES: dict[str, Any] = {
    "liger_kernel.ops.rms_norm": SimpleNamespace(LigerRMSNormFunction=LigerRMSNormFunction),
    "liger_kernel.ops.swiglu": SimpleNamespace(
        swiglu_forward=swiglu_forward,
        swiglu_backward=swiglu_backward,
        LigerFusedGateUpSiLUMulFunction=LigerFusedGateUpSiLUMulFunction,
    ),
    "liger_kernel.ops.geglu": SimpleNamespace(geglu_forward=geglu_forward, geglu_backward=geglu_backward),
}


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let training on this CPU find kernels."""
    monkeypatch.setattr(kernels, "import_module", MODULES.__getitem__)
    monkeypatch.setattr(kernels, "serve", lambda device: True)


def only_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on nothing is computed by a formula that has a kernel."""
    for kind in (kernels.RMSNorm, kernels.SwiGLU, kernels.GeGLU, kernels.JoinedSwiGLU):
        monkeypatch.setattr(kind, "plain", lambda *_: pytest.fail("no kernel computes this"))
