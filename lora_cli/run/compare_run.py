"""One run of a comparison: `lora train`, then `lora eval`, each a process of its own, so that memory is a fresh one's.

A run that failed takes nothing with it; a finished one is read back; one that was stopped goes on by --resume.
"""

import hashlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_cli import io_ops
from lora_cli.errors import ExitCode, UserError
from lora_cli.recipe.load import Loaded, check_parts, placing
from lora_cli.run.folder import RunFolder
from lora_cli.run.stop import Stop
from lora_cli.screen import Screen, duration

if TYPE_CHECKING:
    from lora_cli.progress import Runs
    from lora_cli.run.compare import Run

TRAINING = 0.9
"""Share of a run's progress that is training; the rest is measuring."""
TAIL = 4096
"""Bytes at the end of a log in which its last line is."""


class RunError(Exception):
    """A run's process ended with an error; its message is what the process said."""


# Before


def checked(folder: Path, left: Sequence["Run"], screen: Screen) -> dict[str, int]:
    """What `lora check` finds, for every variant with something left to do; returns its trained parameters.

    Raises:
        UserError: a recipe, its data or its model is wrong.
    """
    variants = {run.variant.name: run.variant.loaded for run in left}
    if not variants:
        return {}
    screen.note(f"checking {', '.join(variants)}")
    # In another process, which takes torch and the models away with it.
    with ProcessPoolExecutor(1, get_context("spawn"), _prepare, (str(_cache(folder)),)) as pool:
        return dict(zip(variants, pool.map(_check, variants.values()), strict=True))


def _prepare(cache: str) -> None:
    """Of the process that checks: leave Ctrl-C to its parent, keep tokenised rows for the runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("LORA_CACHE", cache)


def _check(loaded: Loaded) -> int:
    check_parts(loaded)
    from lora_cli.run.check import check

    try:
        with redirect_stderr(StringIO()), placing(loaded):
            return check(loaded, Screen(), 0)["trained_parameters"]
    except UserError as error:
        what = f"variant '{loaded.name}': {error.what}"
        raise UserError(what, where=error.where, fix=error.fix, code=error.code) from error


def _cache(comparison: Path) -> Path:
    return comparison / "cache"


# One run


def execute(
    run: "Run", trained: dict[str, int], others: Sequence[dict[str, Any]], shown: "Runs", stop: Stop
) -> dict[str, Any]:
    """Train and measure; what was found, or why nothing was.

    Args:
        run: which.
        trained: variant -> trained parameters.
        others: results so far; what is known of the base is not measured again.
        shown: told what is going on.
        stop: whether somebody wants the comparison to stop.

    Raises:
        UserError: it was stopped.
    """
    title = f"{run.variant.name}, seed {run.seed}"
    shown.started(title)
    named = {"variant": run.variant.name, "seed": run.seed, "folder": str(run.folder)}
    try:
        report = _train_and_measure(run, _base_of(run, others), shown, stop)
    except RunError as error:
        shown.ended(f"{title}: failed: {error}", failed=True)
        return {**named, "status": "failed", "error": str(error)}
    numbers = _numbers(run, report, trained[run.variant.name])
    result = {**named, "status": "finished", "base_key": _base_key(run), **numbers}
    io_ops.write_json(run.beside("json"), result)
    shown.ended(f"{title}: {_outcome(result)}")
    return result


def _train_and_measure(run: "Run", base: dict[str, Any] | None, shown: "Runs", stop: Stop) -> dict[str, Any]:
    folder = str(run.folder)
    if not RunFolder(run.folder).adapter.exists():
        command = ["train", str(run.beside("yaml")), "--output", folder, "--resume"]
        _lora(command, run, stop, lambda: shown.moved(*_progress(run)))
    command = ["eval", folder, "--json", *(["--adapter-only"] if base else [])]
    report = json.loads(_lora(command, run, stop, lambda: shown.moved(TRAINING, "measuring")))
    return {"base": base, **report}


def _lora(command: list[str], run: "Run", stop: Stop, tick: Callable[[], None]) -> str:
    """Run a command of ours in a process of its own and return its stdout; what it says goes to the run's log."""
    environment = {"LORA_CACHE": str(_cache(run.folder.parents[1])), **os.environ}
    io_ops.append_line(run.beside("log"), f"$ lora {' '.join(command)}")
    with run.beside("log").open("ab") as log, tempfile.TemporaryFile() as output:
        start = log.tell()
        # A session of its own: Ctrl-C reaches it through us, once, and it saves before it ends.
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "lora_cli", *command],  # -P: no module of the current folder
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
        try:
            _wait(process, stop, tick)
        finally:
            process.kill()
        output.seek(0)
        answer = output.read().decode("utf-8")
    if stop.asked:
        raise UserError(
            "stopped; what is finished is kept",
            where=str(run.folder.parents[1]),
            fix="the same command goes on",
            code=ExitCode.INTERRUPTED,
        )
    if process.returncode:
        raise RunError(_complaint(process.returncode, run.beside("log"), start))
    return answer


def _wait(process: subprocess.Popen[bytes], stop: Stop, tick: Callable[[], None]) -> None:
    """Until the process ends; pass a wish to stop on to it."""
    told = False
    while True:
        try:
            process.wait(timeout=0.3)
        except subprocess.TimeoutExpired:
            tick()
        else:
            return
        if stop.asked and not told:
            process.send_signal(signal.SIGINT)
            told = True


def _complaint(code: int, log: Path, start: int) -> str:
    """Why a process failed, out of what it wrote: our message, or the last line of a traceback."""
    said = log.read_bytes()[start:].decode("utf-8", errors="replace").strip()
    *before, last = re.split("^error: ", said, flags=re.MULTILINE)
    reason = last if before and "Traceback" not in last else said.rpartition("\n")[2]
    if code < 0:
        reason = f"killed by {signal.Signals(-code).name}" + (", most likely for its memory" * (code == -9))
    elif code == ExitCode.INTERRUPTED:
        reason = "somebody else stopped it"
    return reason.strip() or f"exit code {code}"


# What is known of a run


def _progress(run: "Run") -> tuple[float, str]:
    """Share of the run that is done, and what to show of it, by the last line of its log."""
    line = _last_line(RunFolder(run.folder).log)
    if line is None:
        return 0.0, "starting"
    train = run.recipe.train
    if train.max_steps is not None:
        share, where = line["step"] / train.max_steps, f"step {line['step']:,}/{train.max_steps:,}"
    else:
        share, where = line["epoch"] / (train.epochs or 1), f"epoch {line['epoch']:.2f}/{train.epochs or 1:g}"
    loss = f"loss {line['loss']:.4f}" if "loss" in line else f"eval loss {line['eval_loss']:.4f}"
    return TRAINING * min(share, 1.0), f"{where}  {loss}"


def _last_line(log: Path) -> dict[str, Any] | None:
    if not log.exists():
        return None
    with log.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - TAIL, 0))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            return json.loads(line)
        except ValueError:
            continue
    return None


def _numbers(run: "Run", report: dict[str, Any], trained: int) -> dict[str, Any]:
    """Everything that was measured in a run, in SI units and bytes."""
    folder = RunFolder(run.folder)
    steps = [line for line in folder.lines() if "loss" in line]
    before, after = report["base"], report["adapter"]
    known = "general_loss" in after
    return {
        "before": before,
        "after": after,
        "forgetting": after["general_loss"] - before["general_loss"] if known else None,
        "rows": report["rows"],
        "trained_parameters": trained,
        "adapter_bytes": sum(path.stat().st_size for path in folder.adapter.glob("*.safetensors")),
        "peak_memory_bytes": max(line["memory_bytes"] for line in steps),
        "batch_size": run.recipe.train.batch_size,
        "steps": len(steps),
        "seconds_per_step": statistics.median(line["seconds"] for line in steps),
        "seconds": sum(line["seconds"] for line in steps),
    }


def _base_of(run: "Run", others: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The base's numbers, if another run has measured the same base on the same rows."""
    key = _base_key(run)
    return next((each["before"] for each in others if each.get("base_key") == key), None)


def _base_key(run: "Run") -> str:
    """All that the base's numbers depend on."""
    recipe = run.recipe
    seed = run.seed if recipe.data.eval_fraction else None
    known = (recipe.model, recipe.data.model_copy(update={"packing": False}), recipe.eval, seed)
    return hashlib.sha256(repr(known).encode()).hexdigest()[:16]


def _outcome(result: dict[str, Any]) -> str:
    after = result["after"]
    loss = f"held-out loss {after['loss']:.4f}, " if "loss" in after else ""
    return f"{loss}{result['steps']:,} steps in {duration(result['seconds'])}"
