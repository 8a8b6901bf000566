"""TRL tuned by its own options as an expert would on this device, the fastest of what works; see workloads.py."""

from typing import Any

from peer import run
from system import Job, read_job


def grouped(job: Job, rows: list[dict[str, list[int]]]) -> list[dict[str, list[int]]]:
    """The timed rows in the order of the trainer's own group_by_length: steps of rows of about the same length.

    Other steps than those of the other systems, over the same rows and tokens.
    """
    first = job.warmup * job.batch_size
    return rows[:first] + sorted(rows[first:], key=lambda row: -len(row["input_ids"]))


TUNED: dict[str, Any] = {
    "bf16": False,
    "gradient_checkpointing": False,
    "optim": "adamw_torch_fused",
    "logging_strategy": "no",
}

if __name__ == "__main__":
    job = read_job()
    settings = {key: value for key, value in job.tuned.items() if key != "group"}
    rows = job.read_rows()
    run(job, grouped(job, rows) if job.tuned.get("group") else rows, {**TUNED, **settings})
