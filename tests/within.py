"""What is changed or watched within processes that a test starts: each function gets the rank, then its arguments."""

import itertools
import json
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from lora_cli import kernels
from lora_cli.adapter import quantised
from lora_cli.adapter.inject import without_adapters
from lora_cli.evaluate import loss
from lora_cli.run import prepare
from lora_cli.run import train as run
from lora_cli.train import gradient, loop, processes, sharding
from tests import liger


def short_of_memory(rank: int, which: str) -> None:
    """In one process, a backward pass over two rows is too much."""
    if rank != int(which):
        return
    real = gradient._backward

    def backward(run: Any, batch: Any, *others: Any) -> Any:
        found = real(run, batch, *others)
        if len(batch.rows) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    gradient._backward = backward


def impatient(rank: int, seconds: str, work: str, patience: str = "") -> None:
    """A collective may take so many seconds; the first process takes `work` to tokenise, others wait `patience`."""
    real = dist.init_process_group

    def init(*arguments: Any, **settings: Any) -> None:
        real(*arguments, **settings | {"timeout": timedelta(seconds=float(seconds))})

    dist.init_process_group = init
    if patience:
        processes.PATIENCE = timedelta(seconds=float(patience))
    if rank == 0:
        prepare.load_data = slowly(prepare.load_data, float(work))


def slowly(work: Any, seconds: float) -> Any:
    """The same, and it takes longer."""

    def slow(*arguments: Any, **settings: Any) -> Any:
        time.sleep(seconds)
        return work(*arguments, **settings)

    return slow


def stops_after(rank: int, step: str) -> None:
    """Somebody asks all processes to end in the middle of this step."""
    real = loop._update

    def update(training: loop.Training, norm: float) -> None:
        real(training, norm)
        if training.step + 1 == int(step):
            os.kill(os.getpid(), signal.SIGTERM)

    loop._update = update


def killed_in_a_block(rank: int, which: str, count: str) -> None:
    """One process is killed as it gathers so many blocks."""
    real, left = sharding.Gathering.__call__, itertools.count(int(count), -1)

    def call(*arguments: Any, **settings: Any) -> Any:
        if rank == int(which) and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **settings)

    sharding.Gathering.__call__ = call


def asked_while_evaluating(rank: int, which: str) -> None:
    """One process is asked to end while it computes the first of several batches of held-out rows."""
    run.token_budget = lambda device: 8
    real = loss._sums

    def sums(*arguments: Any) -> torch.Tensor:
        if rank == int(which):
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    loss._sums = sums


def with_kernels(rank: int) -> None:
    """What stands in for liger-kernel is found, and nothing else computes."""
    patch, real = pytest.MonkeyPatch(), kernels.use
    liger.stand_in(patch)

    def use(*arguments: Any) -> int:
        count = real(*arguments)
        liger.only_kernels(patch)
        return count

    patch.setattr(kernels, "use", use)


def watched(rank: int, folder: str) -> None:
    """Write down what of the base is in the memory of each process, whenever an adapted layer has computed."""
    real, seen = prepare.share_out, dict[int, torch.Tensor]()
    found: dict[str, Any] = {"gathered": 0}

    def look(model: Any, own: set[int]) -> None:
        """What is gathered has storage; what was gathered and let go has none."""
        whole = (p for p in model.parameters() if not isinstance(p, DTensor) and id(p) not in own)
        seen.update({id(p): p for p in whole})
        now = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in seen.values()}.values())
        found["gathered"] = max(found["gathered"], now)
        (Path(folder) / f"{rank}.json").write_text(json.dumps(found))

    def share_out(model: Any, adapter: Any, accelerator: Any) -> sharding.Shares:
        shares = real(model, adapter, accelerator)
        own = {id(p) for p in adapter.named_tensors().values()}
        shared = [p for p in model.parameters() if isinstance(p, DTensor)]
        found["whole"] = sum(p.numel() * p.element_size() for p in shared)
        found["held"] = sum(p.to_local().untyped_storage().nbytes() for p in shared)
        found["plain"] = sum(
            p.nbytes for p in model.parameters() if not isinstance(p, DTensor) and id(p) not in own
        )
        layers = [layer for layer in model.modules() if isinstance(layer, quantised.Quantised)]
        buffers = [b for layer in layers for b in layer.kept().values() if not isinstance(b, DTensor)]
        found["left"] = sum(b.nbytes for b in buffers)
        with without_adapters(adapter):
            found["codes"], found["made"] = quantised.digest(model), adapter.codes
        for layer in adapter.layers.values():
            layer.register_forward_hook(lambda *_: look(model, own))
            for tensor in layer.own_tensors().values():
                tensor.register_hook(lambda _: look(model, own))
        return shares

    prepare.share_out = share_out
