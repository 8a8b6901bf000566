"""Start: what an init may look at when it fills the first ΔW of a layer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_cli.adapter.base import Base
from lora_cli.adapter.delta import LowRank


@dataclass(frozen=True)
class Start:
    """One layer before its first step."""

    base: Base
    """W0."""
    generator: torch.Generator
    """Of the CPU, so that every device starts from the same numbers."""
    statistic: Tensor | None = None
    """What the init's file says in `measures` that it needs of this layer, measured on training rows."""
    quantised: Callable[[tuple[Tensor, Tensor] | None], Tensor] | None = None
    """dq(q(W0 + B·A)) of given (B, A), float32 [out, in]: what is left of W0 if `delta.fix(B, A)` takes that off it.

    None where W0 is not to be quantised.
    """


def uniform(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Fill a tensor [rows, in] with U(-1/√in, 1/√in), as LoRA's authors do."""
    return nn.init.kaiming_uniform_(tensor, a=5**0.5, generator=generator)


def as_lora(delta: LowRank, start: Start) -> None:
    """A ~ U(-1/√in, 1/√in), B = 0. For an embedding, whose input is one-hot, A = 0 and B ~ N(0, 1)."""
    if delta.reads_ids:
        nn.init.zeros_(delta.A)
        nn.init.normal_(delta.B, generator=start.generator)
        return
    uniform(delta.A, start.generator)
    nn.init.zeros_(delta.B)


def thin(
    W: Tensor, r: int, scale: float, rows: Tensor | float = 1.0, columns: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """(B, A) with scale·B·A the best rank-r approximation of W [out, in], √Σ on either side; zeros if r is larger.

    The best where errors count `rows` [out, 1] times `columns` [in], which are not zero.
    """
    U, S, Vt = torch.linalg.svd(rows * W * columns, full_matrices=False)
    root = (S[:r] / scale).sqrt()
    B, A = W.new_zeros(W.shape[0], r), W.new_zeros(r, W.shape[1])
    B[:, : len(root)], A[: len(root)] = U[:, :r] * root / rows, root[:, None] * Vt[:r] / columns
    return B, A


def decompose(
    delta: LowRank, start: Start, iterations: int, rows: Tensor | float = 1.0, columns: Tensor | float = 1.0
) -> None:
    """W0 = Q + s·B·A: s·B·A of W0 − Q and Q = q(W0 − s·B·A) in turn, beginning with Q = 0.

    The pair of the least error is kept, which need not be the last; errors count as in `thin`.
    """
    assert start.quantised is not None
    W0, smallest = start.base.weight(), float("inf")
    left = W0
    for _ in range(iterations):
        B, A = thin(left, delta.A.shape[0], delta.scale, rows, columns)
        left = W0 - start.quantised((-delta.scale * B, A))
        error = torch.linalg.norm(rows * (left - delta.scale * B @ A) * columns).item()
        if error < smallest:
            smallest = error
            delta.B.copy_(B)
            delta.A.copy_(A)
    delta.subtract_start()


def floored(sizes: Tensor) -> Tensor:
    """Sizes [n] that count errors, none of them zero: of what was never seen a ten-thousandth of the largest."""
    return sizes.clamp(min=1e-4 * sizes.max() + torch.finfo(torch.float32).tiny)
