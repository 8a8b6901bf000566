"""Our commands on strangers' files, in one process in which everything that must not happen is written down.

    python -P -c "from tests.watched import main; main()" PLAN RESULTS

PLAN is JSON: `allowed`, folders that may be written in; `hostile`, the folder of strangers' files; `canary`,
a word in every line of theirs; and `steps`, each with a name, the arguments of `lora`, what stands on stdin,
and, before that, a folder to remove and one to copy to others. RESULTS has a line on whether the watch works,
and one for each step: its exit code, what it said, what it raised, what was seen meanwhile, and by how many
bytes the largest memory so far grew.
"""

import contextlib
import importlib
import io
import json
import os
import pickle
import resource
import shutil
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORBIDDEN = {
    "pickle.find_class",
    "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "pty.spawn",
    "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto",
}  # fmt: skip
CHANGES = {
    "os.mkdir": 1, "os.rmdir": 1, "os.remove": 1, "os.chmod": 1, "os.chown": 1, "os.truncate": 1, "os.utime": 1,
    "os.rename": 2, "os.link": 2, "os.symlink": 2, "os.mkfifo": 1, "os.mknod": 1,
}  # fmt: skip
"""How many of an event's first arguments are paths that change."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
OUR_PROCESS = "template_trial.py"


class Watcher:
    """An audit hook. It only takes notes: nobody's `except` can swallow those."""

    def __init__(self, allowed: list[str], hostile: str, canary: str) -> None:
        self.allowed = tuple(os.path.realpath(folder) for folder in [*allowed, os.devnull])
        self.hostile, self.canary = os.path.realpath(hostile), canary
        self.on, self.seen = False, []

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        self.on = False  # what the notes need is not watched itself
        try:
            if self._is_wrong(event, args):
                self.seen.append(f"{event} {args!r}"[:500])
        finally:
            self.on = True

    def _is_wrong(self, event: str, args: tuple[Any, ...]) -> bool:
        if event == "subprocess.Popen":
            return not any(str(arg).endswith(OUR_PROCESS) for arg in args[1])
        if event == "exec":
            return self._is_theirs(args[0])
        if event == "compile":
            source, file = args
            text = source if isinstance(source, bytes) else str(source).encode(errors="replace")
            # What Jinja makes of a template is compiled too; what it does then is seen in the other events.
            return file != "<template>" and (self.canary.encode() in text or self._is_in_hostile(file))
        if event == "import":
            return any(self._is_in_hostile(path) for path in (args[1], *(args[2] or ())) if path)
        if event == "ctypes.dlopen":
            return self._is_in_hostile(args[0])
        if event == "open":
            return bool((args[2] or 0) & WRITING) and not self._may_change(args[0])
        if event in CHANGES:
            folder = (
                args[-1] if event != "os.truncate" and isinstance(args[-1], int) and args[-1] >= 0 else None
            )
            return not all(self._may_change(path, folder) for path in args[: CHANGES[event]])
        return event in FORBIDDEN

    def _is_theirs(self, code: Any) -> bool:
        return code.co_filename != "<template>" and (
            self._is_in_hostile(code.co_filename) or self.canary in repr((code.co_consts, code.co_names))
        )

    def _is_in_hostile(self, path: Any) -> bool:
        path = os.fsdecode(path or "/")
        return not path.startswith("<") and os.path.realpath(path).startswith(self.hostile)

    def _may_change(self, path: Any, folder: int | None = None) -> bool:
        """The last step of a path is not followed: it is what changes."""
        if isinstance(path, int):
            return True  # opened before, which was seen
        path = os.fsdecode(path)
        if folder is not None:
            path = str(Path(f"/proc/self/fd/{folder}").readlink() / path)
        where = Path(os.path.realpath(Path(path).parent)) / Path(path).name
        return any(where.is_relative_to(each) for each in self.allowed)


def main() -> None:
    """Do the plan."""
    plan = json.loads(Path(sys.argv[1]).read_text())
    _import_what_commands_import()
    watcher = Watcher(plan["allowed"], plan["hostile"], plan["canary"])
    sys.addaudithook(watcher)
    with Path(sys.argv[2]).open("w") as results:
        results.write(json.dumps({"name": "control", **_control(watcher, Path(plan["hostile"]))}) + "\n")
        for step in plan["steps"]:
            results.write(json.dumps({"name": step["name"], **_done(step, watcher)}) + "\n")
            results.flush()


def _import_what_commands_import() -> None:
    """Imports start processes and write caches of their own, long before a stranger's file is read."""
    import matplotlib.figure  # noqa: F401
    from matplotlib.backends import backend_agg  # noqa: F401

    from lora_cli.run import chat, check, evaluate, export, generate, merge, train  # noqa: F401


def _control(watcher: Watcher, theirs: Path) -> dict[str, bool]:
    """What must be noted, done once: whether it was."""
    word, module = watcher.canary, theirs / f"module_of_{watcher.canary}.py"
    module.write_text(f"{word} = 1")
    sys.path.insert(0, str(theirs))
    done = {
        "pickle": lambda: pickle.loads(pickle.dumps(Path("x"))),
        "system": lambda: os.system("true"),
        "process": lambda: subprocess.run(["true"], check=True),
        "socket": lambda: socket.create_connection(("127.0.0.1", 9)),
        "name of a host": lambda: socket.getaddrinfo("localhost", 80),
        "file": lambda: (theirs / "new").write_text(""),
        "file in a folder by its handle": lambda: _unlinked(theirs, "new"),
        "folder": lambda: (theirs / "new").mkdir(),
        "rename": lambda: (theirs / "new").rename(theirs / "newer"),
        "folder away": lambda: (theirs / "newer").rmdir(),
        "their text": lambda: exec(f"{word} = 1"),
        "their module": lambda: importlib.import_module(module.stem),
    }
    return {name: _noted(watcher, act) for name, act in done.items()} | _tidied(theirs, module)


def _unlinked(folder: Path, name: str) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.unlink(name, dir_fd=handle)
    os.close(handle)


def _tidied(theirs: Path, module: Path) -> dict[str, bool]:
    module.unlink()
    sys.path.remove(str(theirs))
    return {}


def _noted(watcher: Watcher, act: Callable[[], object]) -> bool:
    watcher.seen, watcher.on = [], True
    with contextlib.suppress(OSError):
        act()
    watcher.on = False
    return bool(watcher.seen)


def _done(step: dict[str, Any], watcher: Watcher) -> dict[str, Any]:
    from lora_cli import cli

    if "remove" in step:
        shutil.rmtree(step["remove"])
    for folder in step.get("to", ()):
        shutil.copytree(step["copy"], folder, dirs_exist_ok=True)
    said, raised, code = io.StringIO(), None, None
    sys.argv, sys.stdin = ["lora", *step["argv"]], io.StringIO(step.get("stdin", ""))
    before, watcher.seen, watcher.on = _largest_memory(), [], True
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            cli.main()
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException:
            raised = traceback.format_exc()
    watcher.on = False
    grown = _largest_memory() - before
    return {"code": code, "said": said.getvalue(), "raised": raised, "seen": watcher.seen, "grown": grown}


def _largest_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
