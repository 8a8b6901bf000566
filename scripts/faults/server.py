"""Loads a system once, then forks a process for each try: a line of JSON in is a try, a line out is how it ended.

Standard library only. `Server` is the side of the driver; `serve` is what a system's own script ends with.
"""

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from scripts.faults import hooks
from scripts.faults.task import Fault, Task

ROOT = Path(__file__).parents[2]
LONGEST = 300.0
"""Seconds after which a try that hangs is killed."""
LOOK, SETTLE = 0.0005, 0.01
"""Seconds between two looks for a file, and from its appearance to the kill."""


class Server:
    """The other process."""

    def __init__(self, python: Path, module: str, cache: Path) -> None:
        """Start it; `cache` is where it may keep what it computes once."""
        fixed = {
            "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_HOME": str(cache),
        }  # fmt: skip
        environment = {**os.environ, **fixed}
        environment.pop("LORA_CACHE", None)
        self.process = subprocess.Popen(
            [str(python), "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )

    def ask(self, system: str, task: Task, fault: Fault, log: Path) -> list[dict[str, Any]]:
        """Exit code (minus the signal) and seconds of each process of the try."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        asked = {"system": system, "task": asdict(task), "fault": asdict(fault), "log": str(log)}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


def serve(become: Callable[[str, Task], None]) -> None:
    """Answer until nobody asks; `become` trains in a process of its own."""
    for line in sys.stdin:
        asked = json.loads(line)
        task, fault = Task(**asked["task"]), Fault(**asked["fault"])
        print(json.dumps(_try(partial(become, asked["system"], task), task, fault, asked["log"])), flush=True)


def _try(become: Callable[[], None], task: Task, fault: Fault, log: str) -> list[dict[str, Any]]:
    began = time.monotonic()
    children = [_fork(become, task, fault, log)]
    if fault.beside is not None:
        time.sleep(fault.beside)
        children.append(_fork(become, task, fault, f"{log}.2"))
    if fault.after is not None:
        time.sleep(max(0.0, began + fault.after - time.monotonic()))
        os.kill(children[0], fault.signal)  # of a child that has ended and was not waited for: nothing
    return [{"code": _wait(child, fault), "seconds": time.monotonic() - began} for child in children]


def _wait(child: int, fault: Fault) -> int:
    limit = time.monotonic() + LONGEST
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > limit or (fault.once and Path(fault.once).exists()):
            time.sleep(SETTLE)
            os.kill(child, 9)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(LOOK)


def _fork(become: Callable[[], None], task: Task, fault: Fault, log: str) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(said, 1)
        os.dup2(said, 2)
        hooks.note_memory(log)
        hooks.install(task, fault, log)
        become()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(bool(leaving.code))
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        hooks.note_memory(log)
        os._exit(code)
