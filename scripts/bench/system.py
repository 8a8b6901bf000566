"""What every system of the benchmark does alike: read its job, stamp its steps, print one line of JSON.

Standard library only: it is imported by the tool's own environment and by the peers'.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

STARTED = "BENCH_STARTED"
"""Environment variable with the time.time() at which the driver started the process."""
RATE, MAX_NORM, R, ALPHA, SEED = 2e-4, 1.0, 16, 32, 0
"""Learning rate (constant), gradient clipping, adapter and seed of every system."""
IGNORE = -100


@dataclass(frozen=True)
class Job:
    """What one process does."""

    model: str
    adapter: str
    """Folder with the adapter to start from, in PEFT's format."""
    rows: str
    """File with one {"input_ids": [...], "trained": [...]} a line."""
    batch_size: int
    """Rows of an optimizer step."""
    warmup: int
    """Steps that are not timed."""
    timed: int
    tuned: dict[str, object]
    """What the tuned peer sets for this workload: keys of SFTConfig."""

    @property
    def steps(self) -> int:
        """Of the whole process."""
        return self.warmup + self.timed

    def read_rows(self) -> list[dict[str, list[int]]]:
        """The rows that are trained on, in order."""
        with Path(self.rows).open(encoding="utf-8") as file:
            return [json.loads(line) for line in file][: self.steps * self.batch_size]


def read_job() -> Job:
    """The job in the process' only argument."""
    return Job(**json.loads(sys.argv[1]))


def command(python: Path, script: str, job: Job) -> list[str]:
    """How a job is started."""
    return [str(python), str(Path(__file__).with_name(script)), json.dumps(asdict(job))]


def labels(row: dict[str, list[int]]) -> list[int]:
    """The token where it is trained on, else IGNORE; nothing predicts the first one."""
    pairs = zip(row["input_ids"], row["trained"], strict=True)
    return [IGNORE, *(token if trained else IGNORE for token, trained in list(pairs)[1:])]


def in_steps(rows: list[dict[str, list[int]]], batch_size: int) -> Iterator[list[dict[str, list[int]]]]:
    """The rows of each optimizer step."""
    return (rows[at : at + batch_size] for at in range(0, len(rows), batch_size))


class Stamps:
    """Wall time, CPU time and minor page faults at the end of each optimizer step."""

    def __init__(self) -> None:
        """No step is done yet."""
        self.stamps: list[tuple[float, float, int]] = []
        self.losses: list[float] = []

    def step(self) -> None:
        """An optimizer step is done."""
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        self.stamps.append((time.time(), time.process_time(), faults))

    def report(self, rows: list[dict[str, list[int]]], batch_size: int) -> None:
        """Print the result: one entry a step, but step_s, step_cpu_s and minor_faults start at the second step."""
        wall, cpu, faults = zip(*self.stamps, strict=True)
        result = {
            "first_step_s": wall[0] - float(os.environ[STARTED]),
            "step_s": [after - before for before, after in pairwise(wall)],
            "step_cpu_s": [after - before for before, after in pairwise(cpu)],
            "minor_faults": [after - before for before, after in pairwise(faults)],
            "real_tokens": [sum(len(r["input_ids"]) for r in step) for step in in_steps(rows, batch_size)],
            "losses": self.losses,
            "peak_rss_bytes": peak_rss_bytes(),
        }
        print(json.dumps(result))


def peak_rss_bytes() -> int:
    """VmHWM of this process: ru_maxrss would start at what its parent held when it forked."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise LookupError("VmHWM")
