"""How fast this machine is, measured for a few seconds on the model's own shapes."""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_cli.analyze.devices import Device, of_machine

SECONDS = 0.2
"""That one thing is measured for, at least."""
REACHED = 0.41
"""Share of the measured bandwidth that training has on a CPU: its tensors are smaller, strided, and not in caches.
From the fit of `devices.CPU_BANDWIDTH`, on the machine where the bandwidth measured here is 76 GB/s."""

Shape = tuple[int, int]
"""out, in."""


def shapes_of(model: nn.Module) -> Counter[Shape]:
    """Shapes of a model's matrices, and how many there are of each; of tensors real or not."""
    matrices = (m.weight.shape for m in model.modules() if isinstance(m, nn.Linear | Conv1D))
    return Counter((shape[0], shape[1]) for shape in matrices)


def calibrated(shapes: Mapping[Shape, int], device: torch.device, dtype: str, tokens: int) -> Device:
    """The machine at hand, with what was measured in place of what is known of its kind.

    Args:
        shapes: of the model's matrices.
        device: of the run.
        dtype: that the model computes in.
        tokens: at once.
    """
    known, kinds = of_machine(device), {"float32", dtype}
    rates = {kind: _products(shapes, device, getattr(torch, kind), tokens) for kind in kinds}
    bandwidth = _bandwidth(device, getattr(torch, dtype), tokens)
    if device.type == "cuda":
        return replace(known, products=rates, bandwidth=bandwidth)
    # On a CPU attention is computed in float32 whatever the rest is, see lora_cli/attention.py, about as fast as that.
    return replace(known, products=rates, attention=rates["float32"], bandwidth=REACHED * bandwidth)


def _products(shapes: Mapping[Shape, int], device: torch.device, dtype: torch.dtype, tokens: int) -> float:
    """FLOP/s of x·Wᵀ and dY·W, each shape as often as the model has it."""
    flops = taken = 0.0
    for (rows, columns), count in shapes.items():
        W = torch.randn(rows, columns, device=device, dtype=dtype)
        x = torch.randn(tokens, columns, device=device, dtype=dtype)
        dY = torch.randn(tokens, rows, device=device, dtype=dtype)
        taken += count * _seconds(lambda W=W, x=x, dY=dY: (torch.mm(x, W.t()), torch.mm(dY, W)), device)
        flops += count * 4 * tokens * rows * columns
    return flops / taken


def _bandwidth(device: torch.device, dtype: torch.dtype, tokens: int) -> float:
    """Bytes/s of a product by elements of two tensors of a common size of activations."""
    x, y = torch.randn(2, tokens, 4096, device=device).to(dtype)
    return 3 * x.nbytes / _seconds(lambda: x * y, device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The least time of many: what the machine takes when it is left alone."""
    least, end, done = float("inf"), time.perf_counter() + SECONDS, 0
    while time.perf_counter() < end or done < 5:
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        least, done = min(least, time.perf_counter() - began), done + 1
    return least
