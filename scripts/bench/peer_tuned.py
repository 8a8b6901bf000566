"""TRL tuned by its own options as an expert would on a CPU: float32, nothing recomputed, nothing logged.

How many rows of a step are computed at once is the workload's own setting; see workloads.py.
"""

from typing import Any

from peer import run
from system import in_steps, read_job

TUNED: dict[str, Any] = {
    "bf16": False,
    "gradient_checkpointing": False,
    "optim": "adamw_torch_fused",
    "logging_strategy": "no",
}

if __name__ == "__main__":
    job = read_job()
    # Longest first within each step, as group_by_length does: micro-batches of rows of about the same length.
    steps = in_steps(job.read_rows(), job.batch_size)
    rows = [row for step in steps for row in sorted(step, key=lambda row: -len(row["input_ids"]))]
    run(job, rows, {**TUNED, **job.tuned})
