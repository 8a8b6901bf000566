"""The speed benchmark: this tool against TRL and PEFT on the same model, tokens, order and start.

    scripts/bench/install
    .venv/bin/python scripts/bench/run.py --workloads C1,C2 --against b,c --pairs 5

Every run is a process of its own. Each round has this tool beside one or two others; a ratio is made within a round,
and only if the machine was as fast before the one run as before the other. First the tool runs against itself, which
says how large a ratio of nothing is. Nothing else may run. What is found is written to scripts/bench/results/ as it
comes: numbers, table, picture. Pairs are added to those that are known of the same rows, model and packages; after a
change of this tool that should show, remove the file first.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import flops
import ratios
import report
import torch
import workloads
from gemm import probe
from ratios import OURS
from system import STARTED, Job, command
from transformers import AutoTokenizer
from workloads import Sources, Workload

from lora_cli import io_ops
from lora_cli.train.gradient import token_budget

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SYSTEMS = {
    OURS: (ROOT / ".venv", "ours.py", "this tool"),
    "a": (ROOT / ".bench-venv", "peer_default.py", "TRL, its defaults"),
    "b": (ROOT / ".bench-venv", "peer_tuned.py", "TRL, tuned"),
    "c": (ROOT / ".bench-venv", "lean.py", "PEFT, lean loop"),
}
"""Environment, script, title."""
SLOW, SLOW_PAIRS = ("a",), 2
"""Far behind: few pairs are enough."""
NOISE = 2
"""Pairs of this tool against itself."""
PARITY_LIMITS = {"first": 1e-6, "last": 1e-4}
"""Relative differences of the loss in float32, step 1 and step 50."""


class Benchmark:
    """One benchmark: where its files are, and what is known so far."""

    def __init__(self, model: str, sources: Sources, folder: Path, results: Path) -> None:
        """`folder` is for rows and the adapter to start from; `results` is the file of the numbers."""
        self.model, self.sources, self.folder, self.results = model, sources, folder, results
        self.adapter = folder / "adapter"
        subprocess.run([sys.executable, HERE / "start.py", model, self.adapter], check=True)
        self.found: dict[str, Any] = {
            "device": device(),
            "model": model,
            "threads": os.cpu_count(),
            "versions": {name: versions(SYSTEMS[name][0]) for name in (OURS, "b")},
            "systems": {name: title for name, (_, _, title) in SYSTEMS.items()},
            "workloads": {},
        }
        if results.exists():  # what is known stays, unless it was of something else
            known = json.loads(results.read_text(encoding="utf-8"))
            if all(known[key] == self.found[key] for key in ("device", "model", "versions")):
                self.found = known | {key: value for key, value in self.found.items() if key != "workloads"}

    def measure(self, workload: Workload, against: Sequence[str], pairs: int) -> None:
        """Everything about one workload; pairs that are known of the same rows stay, and these are added."""
        rows = workloads.write(workload, self.sources, self.rows_of(workload))
        timed = rows[workload.warmup * workload.batch_size :]
        facts = workloads.facts(timed, workload.batch_size)
        same = {
            **{key: getattr(workload, key) for key in ("title", "batch_size", "warmup", "timed", "tuned")},
            "facts": facts,
        }
        found = self.found["workloads"].get(workload.name)
        if found is None or any(found[key] != value for key, value in same.items()):
            found = {**same, "limit": self.limit(facts), "noise": [], "rounds": []}
            self.found["workloads"][workload.name] = found
        for _ in range(min(NOISE, pairs) - len(found["noise"])):
            self.round(workload, [OURS, OURS], found["noise"])
        quick = [name for name in against if name not in SLOW]
        slow = [name for name in against if name in SLOW]
        planned = [*ratios.order(quick, pairs), *ratios.order(slow, min(SLOW_PAIRS, pairs))]
        for systems in planned:
            self.round(workload, systems, found["rounds"])

    def round(self, workload: Workload, systems: Sequence[str], rounds: list[Any]) -> None:
        """Run the systems one behind the other, and write down what is known now."""
        rounds.append([])
        for system in systems:
            result = {"system": system, "probe": probe(), **self.run(system, workload)}
            rounds[-1].append(result)
            speed = ratios.speed(result, workload.timed)
            print(f"{workload.name}  {SYSTEMS[system][2]:18} {speed:8.1f} tokens/s", flush=True)
        self.write()

    def run(self, system: str, workload: Workload) -> dict[str, Any]:
        """One process."""
        environment, script, _ = SYSTEMS[system]
        job = Job(
            model=self.model,
            adapter=str(self.adapter),
            rows=str(self.rows_of(workload)),
            batch_size=workload.batch_size,
            warmup=workload.warmup,
            timed=workload.timed,
            tuned=workload.tuned,
        )
        return run_json(command(environment / "bin" / "python", script, job))

    def limit(self, facts: dict[str, float]) -> dict[str, float]:
        """Tokens per second if every operation ran at the rate of the model's matrix products."""
        budget = token_budget(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        tokens = min(round(facts["tokens_per_step"]), budget)
        settings = {"model": self.model, "tokens": tokens, "labelled": facts["labelled"]}
        gemm = run_json([sys.executable, str(HERE / "gemm.py"), json.dumps(settings)])
        needed = flops.per_token(flops.Sizes(**gemm["sizes"]), facts["labelled"], facts["attended"])
        rate = gemm["flops_per_second"]
        return {
            "flops_per_token": needed,
            "flops_per_second": rate,
            "tokens_per_second": rate / needed,
        }

    def parity(self, workload: Workload) -> None:
        """The losses of this tool and of the lean loop, the first and the last step."""
        workloads.write(workload, self.sources, self.rows_of(workload))
        ours, theirs = (self.run(system, workload)["losses"] for system in (OURS, "c"))
        apart = {name: ratios.relative(ours[at], theirs[at]) for name, at in (("first", 0), ("last", -1))}
        self.found["parity"] = {
            "steps": workload.steps,
            "relative": apart,
            "holds": {name: apart[name] <= limit for name, limit in PARITY_LIMITS.items()},
            "losses": {OURS: ours, "c": theirs},
        }
        self.write()

    def help(self) -> None:
        """`lora --help`, five whole processes."""
        lora = SYSTEMS[OURS][0] / "bin" / "lora"
        taken = []
        for _ in range(5):
            began = time.perf_counter()
            subprocess.run([lora, "--help"], check=True, stdout=subprocess.DEVNULL)
            taken.append(time.perf_counter() - began)
        self.found["help_s"] = median(taken)
        self.write()

    def write(self) -> None:
        """What is known so far: numbers, table, picture."""
        io_ops.write_json(self.results, self.found)
        io_ops.write_text(self.results.with_suffix(".md"), report.table(self.found))
        io_ops.write_bytes(self.results.with_suffix(".png"), report.picture(self.found))

    def rows_of(self, workload: Workload) -> Path:
        """The file that all systems read."""
        return self.folder / f"{workload.name}.jsonl"


def run_json(line: list[str]) -> dict[str, Any]:
    """Run a process with a thread a core; what it prints last is its result.

    Raises:
        SystemExit: it failed; with what it said.
    """
    threads = str(os.cpu_count())
    fixed = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **fixed, STARTED: str(time.time())}
    made = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
    if made.returncode:
        raise SystemExit(f"{' '.join(line[:2])} failed:\n{made.stderr[-4000:]}")
    return json.loads(made.stdout.splitlines()[-1])


VECTORS = {"avx512_bf16": "AVX-512 with bfloat16", "avx512f": "AVX-512", "avx2": "AVX2"}
"""What the products of a processor hang on: the flag of its widest instructions, as Linux names it."""


def device() -> str:
    """The processor's name, as a rented machine tells it without its model, its vectors and its cores."""
    told = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    names, flags = (re.findall(rf"{key}\s*: (.*)", told) for key in ("model name", "flags"))
    widest = next((name for flag, name in VECTORS.items() if flags and flag in flags[0].split()), None)
    kind = f"{names[0] if names else platform.machine()}{f' ({widest})' if widest else ''}"
    return f"{kind}, {os.cpu_count()} cores"


def versions(environment: Path) -> dict[str, str]:
    """Of the packages that matter, as they stand in an environment."""
    names = ("torch", "transformers", "accelerate", "peft", "trl")
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    return run_json([str(environment / "bin" / "python"), "-c", code])


def shortened(workload: Workload) -> Workload:
    """One step to warm up and one that is timed."""
    return replace(workload, warmup=1, timed=1)


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description="this tool against TRL and PEFT: speed, memory, start")
    known = {workload.name: workload for workload in workloads.CPU}
    parser.add_argument("--workloads", default=",".join(known), help="some of the workloads")
    peers = "; ".join(f"{name}: {title}" for name, (_, _, title) in SYSTEMS.items() if name != OURS)
    parser.add_argument("--against", default="a,b,c", help=peers)
    parser.add_argument(
        "--pairs", type=int, default=5, help=f"of each ratio; {SLOW_PAIRS} of {', '.join(SLOW)}"
    )
    parser.add_argument("--short", action="store_true", help="does everything run? Its figures say nothing")
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--e2e", type=Path, default=ROOT.parent / "shared/data/e2e/train.jsonl")
    parser.add_argument("--named", default="", help="added to the names of the results, such as bf16")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder")
    return parser.parse_args()


def main() -> None:
    """The whole benchmark."""
    asked = arguments()
    texts = (ROOT / "data/reviews/train.jsonl", ROOT / "recipes/data/general.txt")
    sources = Sources(AutoTokenizer.from_pretrained(asked.model), asked.e2e, texts)
    chosen = [each for each in workloads.CPU if each.name in asked.workloads.split(",")]
    against, parity = asked.against.split(","), workloads.PARITY
    if asked.short:
        chosen, asked.pairs, parity = [shortened(each) for each in chosen], 1, replace(parity, timed=2)
    asked.results.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", f"{device()} {asked.named}".lower()).strip("-")
    with tempfile.TemporaryDirectory() as folder:
        benchmark = Benchmark(asked.model, sources, Path(folder), asked.results / f"{name}.json")
        benchmark.help()
        for workload in chosen:
            benchmark.measure(workload, against, asked.pairs)
        if "parity" not in benchmark.found:
            benchmark.parity(parity)
    print(report.table(benchmark.found))


if __name__ == "__main__":
    main()
