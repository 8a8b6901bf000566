"""Several processes that train one adapter: each computes a share of a step's rows, and all make the same step.

What travels is the gradient of what is trained, once a step, in one message, as in DistributedDataParallel; the base
never does. With one process nothing is sent, and everything here does nothing.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from lora_cli.errors import AloneError, ExitCode

PATIENCE = timedelta(days=7)
T = TypeVar("T")


class Processes:
    """The processes of one run, seen from one of them."""

    def __init__(self, accelerator: Accelerator) -> None:
        """As many as the launcher has started."""
        self.rank, self.size = accelerator.process_index, accelerator.num_processes
        self.is_first_of_machine = accelerator.is_local_main_process
        self.device = accelerator.device
        self.patient = cast(Any, dist.new_group(timeout=PATIENCE, backend="gloo") if self.size > 1 else None)
        self.sent = 0
        """Bytes that this process has put into sums."""

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def share(self, things: Sequence[T]) -> Sequence[T]:
        """Every so many-th: over all processes each of them once."""
        return things[self.rank :: self.size]

    def share_evenly(self, things: Sequence[T], filler: T) -> Sequence[T]:
        """The same, with `filler` at the end where others have one thing more: all have equally many."""
        mine = self.share(things)
        return mine if len(mine) * self.size >= len(things) else [*mine, filler]

    def first_alone(self, work: Callable[[], T]) -> T:
        """Do what leaves files: first one process of each machine, then the others, who find them.

        However long it takes: NCCL would end everything after ten minutes.
        """
        if self.size == 1:
            return work()
        found = work() if self.is_first_of_machine else None
        self.wait()
        return work() if found is None else found

    def wait(self) -> None:
        """Until all are here, however long the work of one of them takes."""
        if self.size > 1:
            with others_alive():
                dist.barrier(self.patient)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Add tensors of one type up over the processes, in place."""
        if self.size > 1:
            flat = self._reduced(torch.cat([tensor.reshape(-1) for tensor in tensors]), dist.ReduceOp.SUM)
            _put(flat, tensors)

    def sum_in_order(self, pieces: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        """Add vectors up one after the other, as one process would that had them all, into `tensors`.

        Rounding depends on the order, and this one does not depend on the number of processes.

        Args:
            pieces: this process' share of the vectors, made by `share`.
            tensors: where the pieces of the sum go.
        """
        rounds = int(self._reduced(torch.tensor(len(pieces), device=self.device), dist.ReduceOp.MAX))
        total = nothing = torch.cat([torch.zeros_like(tensor).reshape(-1) for tensor in tensors])
        for number in range(rounds):
            mine = pieces[number] if number < len(pieces) else nothing
            of_all = [torch.empty_like(mine) for _ in range(self.size)]
            self.sent += mine.nbytes
            with others_alive():
                dist.all_gather(of_all, mine)
            for piece in of_all:
                total = total + piece
        _put(total, tensors)

    def least(self, value: int) -> int:
        """The smallest of everybody's values."""
        if self.size == 1:
            return value
        return int(self._reduced(torch.tensor(value, device=self.device), dist.ReduceOp.MIN))

    def most(self, value: int) -> int:
        """The largest of everybody's values."""
        return -self.least(-value)

    def any(self, flag: bool) -> bool:
        """Whether it is so in some process."""
        return not self.least(not flag)

    def all_of(self, values: list[T]) -> list[T]:
        """Everybody's values, by rank."""
        with others_alive():
            return cast(list[T], gather_object(values))

    def told(self, value: T) -> T:
        """The value that the first process has."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        with others_alive():
            broadcast_object_list(values)
        return values[0]

    def start_alike(self, tensors: Sequence[Tensor]) -> None:
        """Give every process the values of the first, in place: what is computed need not be the same everywhere."""
        if self.size > 1:
            with others_alive(), torch.no_grad():
                for tensor in tensors:
                    dist.broadcast(tensor, 0)

    def _reduced(self, tensor: Tensor, how: Any) -> Tensor:
        self.sent += tensor.nbytes
        with others_alive():
            dist.all_reduce(tensor, how)
        return tensor


@contextmanager
def joined() -> Iterator[Accelerator]:
    """Join the processes that a launcher has started, and part from them in the end; alone, when there is none."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    # Told of nothing, accelerate takes two processes on a CPU for two runs of one.
    accelerator = Accelerator(cpu=True) if several and not torch.cuda.is_available() else Accelerator()
    yield accelerator
    if several:  # not after an error: nobody would come to the barrier
        with others_alive():
            accelerator.wait_for_everyone()
        accelerator.end_training()


def _put(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    for tensor, piece in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(piece.view_as(tensor))


@contextmanager
def others_alive() -> Iterator[None]:
    """What a process meets when another one is gone."""
    try:
        yield
    except RuntimeError as error:  # dist.DistBackendError, and gloo's own
        what = "another process of this run has ended"
        fix = "look at its message; the same command with --resume goes on"
        raise AloneError(what, fix=fix, code=ExitCode.INTERRUPTED) from error
