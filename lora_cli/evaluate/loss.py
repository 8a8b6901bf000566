"""Mean loss per trained token over held-out examples."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from lora_cli.adapter.reading import reading
from lora_cli.data.example import IGNORE, Batch
from lora_cli.data.pack import Documents, micro_batches
from lora_cli.errors import ExitCode, UserError, some_of
from lora_cli.evaluate.mode import evaluating
from lora_cli.train.loss import trained_logits

CHUNK = 1024
"""Examples sorted by length at once: enough to pad little, few enough to hold."""


@dataclass(frozen=True)
class HeldOutLoss:
    """Over `trained_tokens` tokens; nats per token."""

    loss: float
    trained_tokens: int
    sums: tuple[float, ...]
    """−Σ log p over the trained tokens of each example."""

    @classmethod
    def of(cls, table: Tensor, examples: Documents) -> "HeldOutLoss":
        """From what `row_sums` gives, of all processes.

        Raises:
            UserError: it is not a finite number; names the rows.
        """
        sums, tokens = table[:, 0].tolist(), int(table[:, 1].sum())
        bad = [examples[row].where for row, nats in enumerate(sums) if not math.isfinite(nats)]
        if bad:
            what = f"the loss of {len(bad)} of {len(sums)} held-out rows is not a finite number"
            fix = "look at these rows, or try --set model.dtype=float32"
            raise UserError(what, where=f"rows {some_of(bad)}", fix=fix, code=ExitCode.NON_FINITE)
        return cls(sum(sums) / tokens, tokens, tuple(sums))

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is too large for a number."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def held_out_loss(
    model: PreTrainedModel,
    examples: Documents,
    *,
    device: torch.device,
    max_tokens: int,
    pad_id: int,
    rows: int | None = None,
) -> HeldOutLoss:
    """The model's loss on the first `rows` examples (default: all); its mode is put back.

    Raises:
        UserError: it is not a finite number; names the rows.
    """
    table = row_sums(model, examples, device=device, max_tokens=max_tokens, pad_id=pad_id, rows=rows)
    return HeldOutLoss.of(table, examples)


def row_sums(
    model: PreTrainedModel,
    examples: Documents,
    *,
    device: torch.device,
    max_tokens: int,
    pad_id: int,
    rows: int | None = None,
    share: Callable[[list[Batch]], Iterable[Batch]] = list,
) -> Tensor:
    """−Σ log p over the trained tokens of each example, and how many these are: float64 [rows, 2], on the CPU.

    `share` picks the batches that this process computes; the rows of the others are zeros.
    """
    count = len(examples) if rows is None else min(rows, len(examples))
    table = torch.zeros(count, 2, dtype=torch.float64)
    with evaluating(model):
        for start in range(0, count, CHUNK):
            chunk = range(start, min(start + CHUNK, count))
            for batch in share(
                micro_batches(
                    examples, chunk, max_tokens=max_tokens, max_rows=None, packing=False, pad_id=pad_id
                )
            ):
                table[batch.rows, 0] = _sums(model, batch, device)
                table[batch.rows, 1] = (batch.labels[:, 1:] != IGNORE).sum(1).double()
    return table


def _sums(model: PreTrainedModel, batch: Batch, device: torch.device) -> Tensor:
    """−Σ log p over the trained tokens of each row of a padded batch, float64 [rows]."""
    with reading(model, lambda: batch.to(device).reading()):
        logits, targets = trained_logits(model, batch, device)
    each = F.cross_entropy(logits.float(), targets, reduction="none").double().cpu()
    row_of = (batch.labels[:, 1:] != IGNORE).nonzero()[:, 0]
    # Added up on the CPU, where the order of the terms, and so the last digit, is always the same.
    return torch.zeros(len(batch.rows), dtype=torch.float64).index_add(0, row_of, each)
