"""The gradient of a step's rows: each process computes those of its share in micro-batches, and all are added up.

It is a sum over the rows, so it is the same however they are split: among processes, and in micro-batches, which
become smaller where memory is short.
"""

import hashlib
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_cli.adapter.reading import reading
from lora_cli.data.example import Batch
from lora_cli.data.pack import micro_batches, nothing
from lora_cli.errors import ExitCode, UserError

if TYPE_CHECKING:
    from lora_cli.train.loop import Training


def token_budget(device: torch.device) -> int:
    """Tokens computed at once under `micro_batch_size: auto`: enough to keep the device busy, few enough to fit."""
    return 8192 if device.type == "cuda" else 768


def accumulate(
    run: "Training", rows: list[int], trained_tokens: int
) -> tuple[list[Batch], list[Tensor], Tensor]:
    """The gradient of all rows, in every process; in smaller micro-batches from now on where memory is short.

    The step is the same: it is a sum over its rows, however they are split.

    Returns:
        The micro-batches of this process, the loss of each, and the loss of all rows, still on the device.
    """
    while True:
        batches = _evened(run, _mine(run, rows))
        for lifecycle in run.lifecycles:
            lifecycle.begin_step(run)
        try:
            losses, pieces = _backwards(run, batches, trained_tokens)
            enough = True
        except torch.OutOfMemoryError as error:
            if run.shares is not None:
                raise _out_of_memory(run) from error
            several = [batch for batch in batches if len(batch.rows) > 1]
            if not several:
                raise _too_long(run, max(batches, key=_cells)) from error
            _shrink(run, max(several, key=_cells))
            losses, pieces, enough = [], [], False
        if enough or run.processes.size > 1:
            loss = _added_up(run, losses, pieces, enough)
            if loss is not None:
                return batches, losses, loss
        # Outside the except clause, which keeps what did not fit alive.
        run.optimizer.zero_grad(set_to_none=True)
        if run.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()


def accumulate_outer(
    run: "Training", rows: list[int], names: Collection[str]
) -> tuple[list[Batch], list[Tensor]]:
    """Give these tensors the gradient of other rows than the step's own; all others keep what they have.

    Returns:
        The micro-batches of this process, and the loss of each.
    """
    own = {name: parameter.grad for name, parameter in run.trained.items()}
    run.optimizer.zero_grad(set_to_none=True)
    batches, losses, _ = accumulate(run, rows, int(run.examples.trained_counts[rows].sum()))
    for name in own.keys() - names:
        run.trained[name].grad = own[name]
    return batches, losses


def _mine(run: "Training", rows: list[int]) -> list[Batch]:
    """The micro-batches of this process: of every so many-th row, by length, so that all have about the same to do.

    Where they are added up in order they are every so many-th of those that one process would make.
    """
    by_length = sorted(rows, key=lambda row: -int(run.examples.lengths[row]))
    batches = micro_batches(
        run.examples,
        by_length if run.adds_in_order else run.processes.share(by_length),
        max_tokens=run.max_tokens,
        max_rows=run.max_rows,
        packing=run.packing,
        pad_id=run.pad_id,
    )
    return [*run.processes.share(batches)] if run.adds_in_order else batches


def _evened(run: "Training", batches: list[Batch]) -> list[Batch]:
    """As many in every process, the last ones of nothing: a base that is shared out is gathered by all together."""
    if run.shares is None:
        return batches
    missing = run.processes.most(len(batches)) - len(batches)
    return [*batches, *(nothing(run.pad_id) for _ in range(missing))]


def _backwards(
    run: "Training", batches: list[Batch], trained_tokens: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Loss and, where they are added up in order, gradient of each micro-batch of this process."""
    losses: list[Tensor] = []
    pieces: list[Tensor] = []
    for index, batch in enumerate(batches):
        losses.append(_backward(run, batch, index, trained_tokens))
        if run.adds_in_order:
            pieces.append(torch.cat([each.reshape(-1) for each in (*_gradients(run), losses[-1])]))
            run.optimizer.zero_grad(set_to_none=True)
    return losses, pieces


def _backward(run: "Training", batch: Batch, index: int, trained_tokens: int) -> Tensor:
    """Add the gradient of one micro-batch; returns its loss as a share of the step's, still on the device.

    What parts add to the loss has no share in what is returned.
    """
    of_all = index * run.processes.size + run.processes.rank
    torch.manual_seed(seed_of(run.train.seed, run.step, of_all))
    with reading(run.model, lambda: batch.to(run.accelerator.device).reading()):
        with run.computing():
            loss = run.loss(batch, run.accelerator.device) / trained_tokens
        if not loss.requires_grad:
            raise unconnected(run, list(run.adapter.trainable()), run.step + 1)
        added = [each for lifecycle in run.lifecycles if (each := lifecycle.loss(run, batch)) is not None]
        run.scaler.scale(sum(added, loss)).backward()
    return loss.detach()


def seed_of(*numbers: int) -> int:
    """A seed that follows from numbers: those of a step and of a micro-batch, so that nothing has to be saved."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "big")


def _gradients(run: "Training") -> list[Tensor]:
    """Of every trained tensor, in float32; zero where it has none."""
    for parameter in run.trained.values():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [p.grad for p in run.trained.values() if p.grad is not None]


def _added_up(run: "Training", losses: list[Tensor], pieces: list[Tensor], enough: bool) -> Tensor | None:
    """Add loss and gradients up over the processes; None when the memory of one of them was not enough."""
    gradients = _gradients(run)
    loss = torch.zeros((), device=run.accelerator.device)
    if run.adds_in_order:
        run.processes.sum_in_order(pieces, [*gradients, loss])
        short = run.processes.any(not enough)
    else:
        for each in losses:  # one after the other, as above
            loss = loss + each
        missing = torch.full_like(loss, not enough)
        run.processes.sum([*gradients, loss, missing])
        short = run.processes.size > 1 and bool(missing)
    if short:
        shrink_alike(run)
        return None
    return loss


def _shrink(run: "Training", batch: Batch) -> None:
    """From now on at most half of this micro-batch at once."""
    if run.max_tokens is not None:
        run.max_tokens = min(run.max_tokens, _cells(batch)) // 2
    else:
        run.max_rows = len(batch.rows) // 2


def shrink_alike(run: "Training") -> None:
    """From now on as little at once as the process with the least memory."""
    if run.max_tokens is not None:
        run.max_tokens = run.processes.least(run.max_tokens)
    if run.max_rows is not None:
        run.max_rows = run.processes.least(run.max_rows)


def _cells(batch: Batch) -> int:
    return batch.input_ids.numel()


def _out_of_memory(run: "Training") -> UserError:
    """Of a base that is shared out: the others wait in the middle of a block, and cannot be told to start again."""
    what, fix = f"out of memory in step {run.step + 1}", "a smaller train.micro_batch_size"
    if not run.train.gradient_checkpointing:
        fix += ", or train.gradient_checkpointing: true"
    where = "train.parallel: fsdp"
    return UserError(what, where=where, fix=f"{fix}; then --resume", code=ExitCode.OUT_OF_MEMORY)


def _too_long(run: "Training", batch: Batch) -> UserError:
    tokens, where = _cells(batch), run.examples[batch.rows[0]].where
    more = "" if run.train.gradient_checkpointing else "train.gradient_checkpointing: true, "
    return UserError(
        f"one row of {tokens:,} tokens needs more memory than there is",
        where=where,
        fix=f"{more}a smaller data.max_length, or a smaller model",
        code=ExitCode.OUT_OF_MEMORY,
    )


def unconnected(run: "Training", dead: list[str], steps: int) -> UserError:
    """What to say of trained tensors that the loss does not depend on."""
    of = len(run.connected)
    return UserError(
        f"{'nothing' if len(dead) == of else dead[0]} received a gradient in the first {steps} steps",
        where=f"{len(dead)} of {of} trained tensors",
        fix="leave these modules out with adapter.exclude_modules",
        code=ExitCode.LEARNED_NOTHING,
    )
