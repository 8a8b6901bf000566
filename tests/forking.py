"""Real processes that are killed: `python -m tests.forking` loads everything once and forks a child for each command.

A line of JSON on stdin is a command, a line on stdout the answer:

    {"arguments": ["train", ...], "after": seconds or null, "signal": 9, "file_bytes": limit or null}
    {"code": exit code, or minus the signal that ended it, "seconds": how long it took, "said": stderr}

With "processes": N a command is run in N processes together, as a launcher would; "number" says which of them gets
the signal (null: all of them), and the answer has their "codes". "within": ["function", argument, ...] is called
first in each of them, with its rank before the arguments: see within.py.
"""

import contextlib
import importlib
import json
import os
import resource
import signal as signals
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GRACE = 8
"""Seconds that the others get when one process has failed."""
ASKING = (signals.SIGINT, signals.SIGTERM)


class Forker:
    """The other side: asks for commands to be run in processes of their own."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        """Speak with this process."""
        self.process = process

    def run(
        self,
        arguments: Sequence[str],
        after: float | None = None,
        number: int = signals.SIGKILL,
        file_bytes: int | None = None,
    ) -> dict[str, Any]:
        """Run a `lora` command; after so many seconds send it a signal, if it still runs."""
        return self._asked(arguments=[*arguments], after=after, signal=number, file_bytes=file_bytes)

    def together(
        self,
        arguments: Sequence[str],
        processes: int,
        after: float | None = None,
        number: int = signals.SIGKILL,
        which: int | None = None,
        within: Sequence[str] = (),
        launched: bool = False,
    ) -> dict[str, Any]:
        """Run it in several processes; after so many seconds send one of them, or all, a signal.

        `within` is a function of within.py, and its arguments, called in each of them first. When one has failed, the
        others are asked to end, at once where they are said to be launched.
        """
        return self._asked(
            arguments=[*arguments],
            after=after,
            signal=number,
            processes=processes,
            which=which,
            within=[*within],
            launched=launched,
        )

    def _asked(self, **asked: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@contextlib.contextmanager
def forker(before: Sequence[str] = ()) -> Iterator[Forker]:
    """Start the process that forks; `before` are the words of a command that starts it, such as `unshare -Urm`."""
    command = [*before, sys.executable, "-m", "tests.forking"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    environment.pop("LORA_CACHE", None)  # tokenising is something to be killed in, too
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )
    with process:
        try:
            yield Forker(process)
        finally:
            process.kill()


def main() -> None:
    """Load everything, then answer."""
    import torch

    from tests import tiny

    torch.set_num_threads(1)
    tiny.model()  # transformers loads the files of a kind of model on first use
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps((_answers if "processes" in asked else _answer)(**asked)), flush=True)


def _answers(
    arguments: list[str],
    after: float | None,
    signal: int,
    processes: int,
    which: int | None,
    within: list[str],
    launched: bool,
) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.perf_counter()
    said, heard = os.pipe()
    signals.pthread_sigmask(signals.SIG_BLOCK, ASKING)
    children: list[int] = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            os.environ |= {key: str(value) for key, value in place.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            if within:
                importlib.import_module("tests.within").__dict__[within[0]](rank, *within[1:])
            _become(arguments, heard, None)
        children.append(child)
    signals.pthread_sigmask(signals.SIG_UNBLOCK, ASKING)
    os.close(heard)
    if after is not None:
        time.sleep(after)
        for child in children if which is None else [children[which]]:
            os.kill(child, signal)
    ended = _all_ended(children, launched)
    seconds = time.perf_counter() - began
    with os.fdopen(said, encoding="utf-8") as text:
        return {"codes": [ended[child] for child in children], "seconds": seconds, "said": text.read()}


def _all_ended(children: list[int], launched: bool) -> dict[int, int]:
    """Exit codes. As launchers do, end the others when one has failed: they may wait for it for ever."""
    ended: dict[int, int] = {}
    failed_at = None
    while len(ended) < len(children):
        for child in set(children) - ended.keys():
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                ended[child] = os.waitstatus_to_exitcode(status)
                if ended[child] and failed_at is None:
                    failed_at = time.monotonic()
                    for other in set(children) - ended.keys() if launched else ():
                        os.kill(other, signals.SIGTERM)
            elif failed_at is not None and time.monotonic() - failed_at > GRACE:
                os.kill(child, signals.SIGKILL)
        time.sleep(0.01)
    return ended


def _answer(arguments: list[str], after: float | None, signal: int, file_bytes: int | None) -> dict[str, Any]:
    began = time.perf_counter()
    said, heard = os.pipe()
    signals.pthread_sigmask(signals.SIG_BLOCK, ASKING)
    child = os.fork()
    if child == 0:
        _become(arguments, heard, file_bytes)
    signals.pthread_sigmask(signals.SIG_UNBLOCK, ASKING)
    os.close(heard)
    code = _wait(child, after, signal)
    seconds = time.perf_counter() - began
    with os.fdopen(said, encoding="utf-8") as text:
        return {"code": code, "seconds": seconds, "said": text.read()}


def _wait(child: int, after: float | None, number: int) -> int:
    if after is not None:
        time.sleep(after)
        os.kill(child, number)  # of a child that has ended and was not waited for, this does nothing
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _become(arguments: list[str], said: int, file_bytes: int | None) -> None:
    """In the child: be the command."""
    from lora_cli.cli import main

    os.dup2(said, 1)
    os.dup2(said, 2)
    signals.signal(signals.SIGTERM, signals.default_int_handler)  # as `main` does first of all
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    sys.argv = ["lora", *arguments]
    code = 70
    try:
        signals.pthread_sigmask(signals.SIG_UNBLOCK, ASKING)
        main()
        code = 0
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    except KeyboardInterrupt:  # before `main` was there to answer it
        code = 75
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
