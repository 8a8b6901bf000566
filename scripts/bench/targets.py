"""What was aimed at, beside what was measured: scripts/bench/results/targets.md, from the results that are there.

.venv/bin/python scripts/bench/targets.py
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ratios
import report
from ratios import OURS

from lora_cli import io_ops

RESULTS = Path(__file__).parent / "results"
Measured = Callable[[dict[str, Any], str], float | None]
"""(results of one machine and type, workload) -> the number, or None where it was not measured."""


def against(peer: str, kind: str) -> Measured:
    """Median ratio; of times, of the pairs between which the machine was steady."""

    def measured(found: dict[str, Any], name: str) -> float | None:
        workload = found["workloads"].get(name)
        ratio = report.ratio(workload, peer, kind) if workload else None
        return ratio["median"] if ratio else None

    return measured


def share(found: dict[str, Any], name: str) -> float | None:
    """Of the speed that the matrix products alone would allow."""
    workload = found["workloads"].get(name)
    speeds = report.speeds_of(workload).get(OURS) if workload else None
    return ratios.summary(speeds)["median"] / workload["limit"]["tokens_per_second"] if speeds else None


AIMS: tuple[tuple[str, str, Measured, float, float], ...] = (
    ("speed against tuned TRL", "C1, C4", against("b", "speed"), 2.3, 3.0),
    ("speed against the lean PEFT loop", "C1, C4", against("c", "speed"), 1.15, 1.4),
    ("speed against tuned TRL", "C2", against("b", "speed"), 1.45, 1.7),
    ("speed against TRL's defaults", "C3", against("a", "speed"), 2.8, 4.0),
    ("share of the limit", "C2", share, 0.75, 0.85),
    ("share of the limit", "C1", share, 0.65, 0.75),
    ("peak memory against tuned TRL", "C1, C2, C3, C4", against("b", report.PEAK), 0.6, 0.5),
    ("start to first step against tuned TRL", "C1, C2, C3, C4", against("b", "first_step_s"), 0.5, 0.35),
)
"""What, on which workloads, how it is measured, what is to be reached, and what lies beyond."""
DORA = ("time of a DoRA step over LoRA's", 1.15, 1.08)
ON_GPU = (
    "8B, rows of 2,048, one H100, tokens/s | 15,000 | 17,000",
    "GPU, speed against tuned TRL | 1.3 | 1.5",
    "GPU, speed against Unsloth's kernels with recomputation | 1.3 | 1.5",
    "GPU, 135M at 4,096 tokens a step, speed against PEFT | 3 | 5",
    "NF4 against bfloat16 at 8,192 tokens a step, speed | 0.93 | 0.96",
)


def table(results: dict[str, dict[str, Any]], methods: dict[str, Any]) -> str:
    """Markdown: a line an aim and workload, a column a type."""
    lines = [["aim", "reach", "beyond", *results], ["---"] * (3 + len(results))]
    for title, names, measured, reach, beyond in AIMS:
        for name in names.split(", "):
            cells = [_cell(measured(found, name), reach, beyond) for found in results.values()]
            lines.append([f"{title}, {name}", f"{reach:g}", f"{beyond:g}", *cells])
    title, reach, beyond = DORA
    found = [methods.get(dtype, {}).get("dora") for dtype in results]
    cells = [_cell(each and each["over_lora"]["median"], reach, beyond) for each in found]
    lines.append([title, f"{reach:g}", f"{beyond:g}", *cells])
    lines += [[each, *(["no GPU"] * len(results))] for each in ON_GPU]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", NOTE, ""])


NOTE = (
    "Bold: reached; ★: what lies beyond is, too. Empty: no pair of runs between which the machine was steady."
)


def _cell(value: float | None, reach: float, beyond: float) -> str:
    """`beyond` tells which way is better."""
    if value is None:
        return ""
    sign = 1 if beyond > reach else -1
    shown = f"{value:.2f}"
    if sign * value >= sign * reach:
        shown = f"**{shown}**"
    return f"{shown} ★" if sign * value >= sign * beyond else shown


def main() -> None:
    """From the results of the two machines that there are."""
    stem = "amd-epyc-2-cores"
    files = {
        "float32": f"{stem}.json",
        "bfloat16": f"{stem}-bf16.json",
        "float32, AVX2": "amd-epyc-avx2-2-cores.json",
    }
    results = {name: json.loads((RESULTS / file).read_text(encoding="utf-8")) for name, file in files.items()}
    methods = json.loads((RESULTS / f"methods-{stem}.json").read_text(encoding="utf-8"))
    io_ops.write_text(RESULTS / "targets.md", table(results, methods))


if __name__ == "__main__":
    main()
