"""Liger's own kernels, run line by line on the CPU by Triton's interpreter: what tests/test_kernels.py starts.

The interpreter lacks what these kernels use, and is given it here: scalars that are no integers, two functions of
CUDA's library, and bfloat16, whose bits it would multiply as integers. The kernels themselves are not touched.
"""

import random

import numpy as np
import pytest
import torch
import triton.language as tl
from liger_kernel.ops import geglu, rms_norm
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from lora_cli import kernels
from lora_cli.train import loop
from tests import liger, tiny
from tests.test_kernels import CPU, KINDS, OPERATIONS, exactly, numbers, value_and_gradients, varied
from tests.training import Rows, fresh, training

# What the interpreter lacks

_plain_argument, _plain_cast = interpreter._implicit_cvt, InterpreterBuilder.cast_impl
_plain_operator = InterpreterBuilder.binary_op


def _argument(value):
    if isinstance(value, float):
        return tl.tensor(TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
    return _plain_argument(value)


def _cast(self, source, kind):
    """To bfloat16 by rounding to the nearest, as GPUs do; the interpreter cuts off."""
    if source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
    return _plain_cast(self, source, kind)


def _operator(self, left, right, operator):
    if left.dtype.scalar != tl.bfloat16:
        return _plain_operator(self, left, right, operator)
    wide = (_cast(self, each, tl.float32) for each in (left, right))
    return _cast(self, _plain_operator(self, *wide, operator), tl.bfloat16)


@pytest.fixture(autouse=True, scope="module")
def completed():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_implicit_cvt", _argument)
        patch.setattr(InterpreterBuilder, "binary_op", _operator)
        for name in ("create_fp_trunc", "create_fp_ext"):
            patch.setattr(InterpreterBuilder, name, _cast)
        patch.setattr(rms_norm, "rsqrt", lambda x: tl.rsqrt(x))
        patch.setattr(geglu, "tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)
        yield


# Kernels


@pytest.mark.parametrize("dtype", kernels.ROUNDING)
@pytest.mark.parametrize("operation", OPERATIONS, ids=repr)
def test_a_kernel_is_its_formula_and_gradient_to_rounding(operation, dtype):
    """Of random widths, against the definition in float64."""
    drawn = numbers(operation, random.choice([2, 30, 64, 130]), dtype)
    found = value_and_gradients(operation.kernel, drawn)
    wanted = value_and_gradients(exactly(operation), [t.double() for t in drawn])
    for ours, exact in zip(found, wanted, strict=True):
        assert ours.dtype is dtype
        far = 8 * torch.finfo(dtype).eps * exact.abs().max()
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=float(far))


@pytest.mark.parametrize("operation", OPERATIONS, ids=repr)
def test_what_stands_in_for_the_kernels_takes_and_gives_what_they_do(operation, monkeypatch):
    """The tests that run without liger rest on it; the value tells the two ways to cast apart to the bit."""
    drawn = numbers(operation, 30, torch.float16)
    found = value_and_gradients(operation.kernel, drawn)
    liger.stand_in(monkeypatch)
    stood = value_and_gradients(operation.kernel, drawn)
    for ours, theirs in zip(found, stood, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=2e-3, atol=2e-3 * float(ours.abs().max()))
    assert (found[0] == stood[0]).float().mean() > 0.97


def test_the_kernels_write_gradients_over_what_was_kept_and_the_second_time_is_an_error():
    x = torch.randn(3, 24, generator=fresh(), requires_grad=True)
    y = kernels.SwiGLU("cpu").kernel(x * 2, x + 1)
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# Models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_of_a_model_are_those_without_kernels(kind, dtype, monkeypatch):
    generator, number = fresh(), random.getrandbits(16)
    ids = torch.randint(5, tiny.VOCABULARY, (2, 9), generator=generator)
    found = []
    for used in (False, True):
        model = varied(tiny.model(kind, number).to(dtype), number)
        if used:
            assert kernels.use(model, CPU, dtype) == sum(KINDS[kind].values())
            liger.only_kernels(monkeypatch)
        logits = model(ids, use_cache=False).logits
        logits.float().square().sum().backward()
        found.append(
            [logits.detach(), *(model.get_parameter(name).grad for name, _ in model.named_parameters())]
        )
    for ours, plain in zip(*found, strict=True):
        far = float((ours - plain).float().norm() / plain.float().norm())
        assert far < {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]


@pytest.mark.parametrize("settings", [{}, {"train_also": ("norms",)}], ids=["frozen norms", "trained norms"])
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_steps_of_training_are_those_without_kernels(settings, recomputed, monkeypatch):
    number, rows, found = random.getrandbits(16), Rows(4), []
    for used in (False, True):
        how = {"max_steps": 2, "gradient_checkpointing": recomputed, "optimizer": "sgd"}
        run = training({"dropout": 0.0, **settings}, how, kind="qwen3", seed=number, rows=rows)
        if used:
            kernels.use(run.model, CPU, torch.float32)
            liger.only_kernels(monkeypatch)
        losses = [report.loss for report in loop.train_steps(run)]
        found.append((losses, {name: p.detach().clone() for name, p in run.adapter.trainable().items()}))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    for name, tensor in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], tensor, rtol=1e-4, atol=1e-6)
