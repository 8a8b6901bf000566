"""Inside the process of a try: count its training passes and file operations, slow it down, let its memory run out.

The same for all systems: what is watched is transformers' Llama, Python's audit events, and the two functions that
write a file without Python's knowledge.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

from scripts.faults.task import Fault, Task

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = (
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.chmod",
    "os.link",
    "os.symlink",
    "os.truncate",
)
WROTE = "faults.write"
"""Our own event, before and after a library writes a file."""


def install(task: Task, fault: Fault, log: str) -> None:
    """Watch this process."""
    _watch_model(fault, f"{log}.forwards")
    _watch_files(task, fault, f"{log}.operations")


def count(log: Path, what: str) -> int:
    """How many `forwards` or `operations` a process has noted."""
    noted = Path(f"{log}.{what}")
    return len(noted.read_text(encoding="utf-8").splitlines()) if noted.exists() else 0


def note_memory(log: str) -> None:
    """The largest memory so far, in bytes; of a process just forked, what it was forked with."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            _note(f"{log}.memory", str(int(line.split()[1]) * 1024))


def _watch_model(fault: Fault, notes: str) -> None:
    import torch
    from transformers.models.llama.modeling_llama import LlamaModel

    forward, done = LlamaModel.forward, 0

    def watched(own: Any, input_ids: Any = None, *others: Any, **named: Any) -> Any:
        nonlocal done
        given = named.get("inputs_embeds") if input_ids is None else input_ids
        if not (own.training and torch.is_grad_enabled()):  # not a step: something is only looked at
            return forward(own, input_ids, *others, **named)
        tokens = given.shape[0] * given.shape[1]
        done += 1
        if fault.most_tokens is not None and done > fault.from_forward and tokens > fault.most_tokens:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {tokens} GiB.")
        time.sleep(fault.pace)
        _note(notes, f"{given.shape[0]}x{given.shape[1]}")
        return forward(own, input_ids, *others, **named)

    LlamaModel.forward = watched


def _watch_files(task: Task, fault: Fault, notes: str) -> None:
    done = 0

    def happened(what: str, path: Any) -> None:
        nonlocal done
        if not isinstance(path, str | bytes | os.PathLike):
            return
        full = os.path.join(task.out, os.fsdecode(path))  # noqa: PTH118 — relative: to a folder that is held open
        if full != task.out and not full.startswith(f"{task.out}/"):
            return
        if done == fault.operation:
            os.kill(os.getpid(), 9)
        done += 1
        _note(notes, f"{what} {full.removeprefix(task.out)}")

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in CHANGES or event == WROTE or (event == "open" and (args[2] or 0) & WRITING):
            happened(event, args[0])

    _announce_writes()
    sys.addaudithook(hook)


def _announce_writes() -> None:
    """torch.save and safetensors write through C++ and Rust, which no audit event tells of."""
    import safetensors.torch
    import torch

    def announced(function: Any, place: int) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            path = args[place] if len(args) > place else named.get("filename", named.get("f"))
            sys.audit(WROTE, path)
            function(*args, **named)
            sys.audit(WROTE, path)

        return call

    torch.save = announced(torch.save, 1)
    real = safetensors.torch.save_file
    save_file = announced(real, 1)
    for module in [*sys.modules.values()]:  # whoever has imported it, by whatever name
        for name in [name for name, value in vars(module).items() if value is real]:
            setattr(module, name, save_file)


def _note(path: str, line: str) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(handle, f"{line}\n".encode())
    os.close(handle)
