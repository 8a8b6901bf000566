"""TRL with its own defaults: bfloat16 autocast, gradient checkpointing, padded batches."""

from peer import run
from system import read_job

if __name__ == "__main__":
    job = read_job()
    run(job, job.read_rows(), {})
