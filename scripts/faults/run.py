"""The same faults against this tool, against transformers' Trainer with PEFT, and against TRL's SFTTrainer.

    .venv/bin/python -m scripts.faults.run                  # all faults, a few tries each: about an hour
    .venv/bin/python -m scripts.faults.run --only P1,P6     # some; the results of the others stay as they are
    .venv/bin/python -m scripts.faults.run --full           # as often as for a release: many hours

scripts/bench/install makes .bench-venv, where the peers live. Everything runs on one thread, one try at a time.
The results and the table stand in scripts/faults/results, all that the processes said in runs/faults.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from scripts.faults import damaged, disk, inputs, killed, numbers, report
from scripts.faults.lab import SYSTEMS, Finding, Lab
from scripts.faults.server import ROOT
from scripts.faults.task import BEST, BEST_OF_TRL

INSIDE = "FAULTS_INSIDE"
"""Set in the process that has its own mounts, which a full disk needs."""
FAULTS: dict[str, tuple[str, Callable[[Lab, str], Finding]]] = {
    "P0": ("nothing happens: the same bytes each time", killed.control),
    "P1": ("SIGKILL at a random time, then the same command: finishes with the same bytes", killed.random_kills),
    "P2": ("SIGKILL just before an operation on a file, then the same command: the same bytes", killed.in_a_save),
    "P3": ("half of a file that a checkpoint is read from is zeros: refused, or the same bytes", damaged.zeroed_tails),
    "P4": ("a bit flipped in one of these files: refused, or the same bytes", damaged.flipped_bits),
    "P5": ("one of these files lost: refused, or the same bytes", damaged.lost_files),
    "P6": ("disk full, then space again and the same command: the same bytes", disk.full_disk),
    "P7": ("SIGTERM, then the same command: the same bytes, at most one step lost", killed.stops),
    "P8": ("a row makes the loss NaN: stops before anything of it is saved", numbers.not_a_number),
    "P9": ("a prompt longer than max_length: its line is named", inputs.long_prompts),
    "P10": ("a module that does not exist beside one that does; a misspelt key: refused", inputs.misspelt_names),
    "P11": ("configurations with a mistake: no traceback, no misspelt key passed over", inputs.configs),
    "P12": ("memory for half a batch only: the weights of the whole batch", numbers.out_of_memory),
    "P13": ("a batch computed in pieces: the same weights", numbers.in_pieces),
    "P14": ("pickles with code, in place of files of checkpoint or model: none is run", damaged.hostile_files),
    "P15": ("a wrong line in 100,000: its number", inputs.broken_line),
    "P16": ("two runs in one folder: the second is refused, the first undisturbed", killed.together),
}  # fmt: skip


def versions() -> str:
    """Of what is compared."""
    names = ("torch", "transformers", "accelerate", "peft", "trl", "datasets")
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    line = [str(ROOT / ".bench-venv/bin/python"), "-c", code]
    found = json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout)
    return ", ".join(f"{name} {version}" for name, version in found.items())


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="many tries of each fault")
    parser.add_argument("--only", default=",".join(FAULTS), help="some of the faults")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="some of the systems")
    parser.add_argument("--logs", type=Path, default=Path("runs/faults"), help="folder for what they say")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def main() -> None:
    """Every fault against every system."""
    asked = arguments()
    if INSIDE not in os.environ:
        os.environ[INSIDE] = "1"
        os.execvp("unshare", ["unshare", "-Urm", sys.executable, "-m", "scripts.faults.run", *sys.argv[1:]])
    asked.logs.mkdir(parents=True, exist_ok=True)
    about = {
        "Machine": f"{platform.machine()}, CPU, one thread; {versions()}",
        "Task": "a Llama of one layer, 12 rows, 8 steps, a checkpoint every 2: so short a run spends far more of its "
        "time in saving than a real one, and a kill at random meets a save that much more often",
        "Best settings": ", ".join(f"`{name}={value}`" for name, value in {**BEST, **BEST_OF_TRL}.items())
        + "; folders marked as incomplete are passed over. Both columns go on from the newest checkpoint folder, as "
        "the example scripts do",
        "P7": "a step takes half a second and every fourth is saved; `enable_jit_checkpoint` waits three seconds",
        "P9": "the Trainer has no max_length: its rows are cut by the script, to the same length",
        "P11": "read by `lora`, by transformers' HfArgumentParser, and by TRL's TrlParser",
        "Cells": "how often it did what is asked, of how many tries; then all that happened",
        "Raw logs": f"all that the processes said stands in `{asked.logs}` after "
        "`python -m scripts.faults.run`",
    }
    questions = {name: question for name, (question, _) in FAULTS.items()}
    with (
        tempfile.TemporaryDirectory() as folder,
        Lab(Path(folder), asked.logs.resolve(), asked.full).open() as lab,
    ):
        for name in asked.only.split(","):
            for system in asked.systems.split(","):
                began = time.monotonic()
                for old in asked.logs.glob(f"{name}-*{system}-[0-9]*"):
                    old.unlink()
                finding = FAULTS[name][1](lab, system)
                print(f"{name} {system}: {finding.ok} of {finding.tried}: {finding.said}", end="")
                print(f" [{time.monotonic() - began:.0f} s]", flush=True)
                results = report.add(asked.results / "faults.json", [finding], about)
                path = asked.results / "faults.md"
                path.write_text(report.table(results, questions), encoding="utf-8")


if __name__ == "__main__":
    main()
