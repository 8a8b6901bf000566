"""The fused product against the two plain lines that define it."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lora_cli.adapter.fused import product
from tests.training import fresh

IN, OUT, R, SCALE = 6, 5, 2, 0.7


def plain(x, dropped, W, bias, A, B, scale):
    return F.linear(x, W, bias) + scale * F.linear(F.linear(dropped, A), B)


def numbers(*shape, grad=True):
    return torch.randn(*shape, generator=fresh(), dtype=torch.float64).requires_grad_(grad)


def test_there_may_be_no_rows():
    """An adapted head whose batch has no token to learn: a process that has fewer rows than others."""
    x, W = numbers(0, IN), numbers(OUT, IN, grad=False)
    A, B = numbers(R, IN), numbers(OUT, R)
    y = product(x, x, W, None, A, B, SCALE)
    assert y.shape == (0, OUT)
    assert [float(g.sum()) for g in torch.autograd.grad(y.sum(), (x, A, B))] == [0, 0, 0]


CASES = {
    "plain": {},
    "bias": {"bias": (OUT,)},
    "dropout": {"dropped": True},
    "dropout and bias": {"dropped": True, "bias": (OUT,)},
    "nothing below": {"x_grad": False},
    "A frozen": {"A_grad": False},
    "B frozen": {"B_grad": False},
    "transposed": {"transposed": True},
}


def arguments(dropped=False, bias=None, x_grad=True, A_grad=True, B_grad=True, transposed=False):
    x = numbers(3, 4, IN, grad=x_grad)
    W = numbers(IN, OUT, grad=False).t() if transposed else numbers(OUT, IN, grad=False)
    return (
        x,
        numbers(3, 4, IN) if dropped else x,
        W,
        numbers(*bias) if bias else None,
        numbers(R, IN, grad=A_grad),
        numbers(OUT, R, grad=B_grad),
        SCALE,
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fused_product_is_the_plain_one_and_so_are_its_gradients(case):
    given = arguments(**case)
    leaves = [t for t in dict.fromkeys(given) if isinstance(t, torch.Tensor) and t.requires_grad]
    dY = numbers(3, 4, OUT, grad=False)
    fused, expected = product(*given), plain(*given)
    torch.testing.assert_close(fused, expected, rtol=1e-13, atol=1e-13)
    for found, right in zip(
        torch.autograd.grad(fused, leaves, dY), torch.autograd.grad(expected, leaves, dY), strict=True
    ):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_of_the_fused_product_are_finite_differences(case):
    x, dropped, W, bias, A, B, scale = arguments(**case)
    given: Any = (x, dropped, A, B) if bias is None else (x, dropped, A, B, bias)
    assert torch.autograd.gradcheck(
        lambda x, dropped, A, B, bias=None: product(x, dropped, W, bias, A, B, scale), given
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_product_computes_in_what_autocast_says_and_gives_each_gradient_its_own_type(dtype):
    generator = fresh()
    x, W = torch.randn(3, IN, generator=generator), torch.randn(OUT, IN, generator=generator)
    A, B = torch.randn(R, IN, generator=generator), torch.randn(OUT, R, generator=generator)
    A, B = nn.Parameter(A), nn.Parameter(B)
    with torch.autocast("cpu", dtype=dtype):
        y = product(x, x, W, None, A, B, SCALE)
    y.float().sum().backward()
    assert y.dtype is dtype
    assert A.grad is not None
    assert B.grad is not None
    assert A.grad.dtype is B.grad.dtype is torch.float32
    near = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.float(), plain(x, x, W, None, A, B, SCALE), rtol=near, atol=8 * near)


def test_nothing_of_the_input_is_kept_when_a_is_frozen():
    kept = []
    given = arguments(A_grad=False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        product(*given)
    assert (12, IN) not in kept
    assert (12, R) in kept


def test_work_is_two_products_with_the_weight_and_no_gradient_of_it():
    """The two thin products that are added in place are not among those counted."""
    rows, given = 12, arguments()
    with FlopCounterMode(display=False) as counted:
        product(*given).sum().backward()
    assert counted.get_total_flops() == 2 * rows * (2 * IN * OUT + 2 * R * (IN + OUT))
