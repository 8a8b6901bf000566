"""`lora train --processes N`: the same command in N processes, through PyTorch's elastic launcher.

`torchrun -m lora_cli train ...` and `accelerate launch -m lora_cli train ...` do the same with flags of their own.
"""

import logging
import os
import socket
import sys
import tempfile
from collections.abc import Sequence

import psutil
import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from lora_cli.errors import ExitCode, UserError

GRACE = 600
"""Seconds that processes get to end a step and save it, once they are asked to stop."""


def launch(arguments: Sequence[str], processes: int, nodes: int = 1, rendezvous: str = "localhost:0") -> None:
    """Run `lora` with these arguments in several processes, and wait for all of them.

    When one fails, the others are ended, and its exit code is ours: it has said what was wrong.

    Args:
        arguments: of the command line, without those of the launcher.
        processes: on this machine.
        nodes: machines, each of which starts the same command.
        rendezvous: `host:port` of one of them, where they meet.

    Raises:
        UserError: there are fewer GPUs than processes, or a process was killed.
    """
    devices = torch.cuda.device_count()
    if 0 < devices < processes:
        what = f"{processes} processes on {devices} GPUs"
        raise UserError(what, where="--processes", fix=f"--processes {devices} at most")
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // processes, 1)))
    logging.getLogger("torch.distributed.elastic").setLevel(
        logging.CRITICAL
    )  # the processes speak for themselves
    address, meets_here = _place(rendezvous) if nodes > 1 else (None, True)
    with tempfile.TemporaryDirectory() as folder:
        config = LaunchConfig(
            min_nodes=nodes,
            max_nodes=nodes,
            nproc_per_node=processes,
            run_id="lora",
            rdzv_backend="c10d",
            rdzv_endpoint=rendezvous,
            rdzv_configs={"is_host": meets_here},
            local_addr=address,
            max_restarts=0,
            shutdown_timeout=GRACE,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "lora_cli", *arguments)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode < 0:
                what = f"process {rank} was killed by signal {-failure.exitcode}"
                fix = "signal 9 is most often a lack of memory; the same command with --resume goes on"
                raise UserError(what, fix=fix, code=ExitCode.INTERRUPTED) from error
            sys.exit(failure.exitcode)
        except SignalException:
            sys.exit(ExitCode.INTERRUPTED)


def _place(rendezvous: str) -> tuple[str, bool]:
    """The address under which the other machines reach this one, and whether they meet here.

    Asked of the routing table: what a machine's own name stands for is often 127.0.0.1.

    Raises:
        UserError: there is no such host.
    """
    host = rendezvous.rpartition(":")[0]
    try:
        there = socket.gethostbyname(host)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((there, 9))  # sends nothing
            here = probe.getsockname()[0]
    except OSError as error:
        what, fix = f"cannot be reached ({error.strerror})", "HOST:PORT of one of the machines"
        raise UserError(f"{host or rendezvous} {what}", where="--rendezvous", fix=fix) from error
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == here for each in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    return here, here == there
