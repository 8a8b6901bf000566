"""Peak memory of this tool on every workload of the benchmark, a process each; of nobody else, and no times.

    .venv/bin/python scripts/bench/peaks.py --e2e shared/data/e2e/train.jsonl

Memory does not depend on what else runs, so this can be measured anew after a change without the benchmark. What is
found is written to scripts/bench/results/; predictions of `lora estimate` are held against it.
"""

import argparse
import re
import tempfile
from pathlib import Path

import workloads
from run import HERE, ROOT, Benchmark, device
from transformers import AutoTokenizer
from workloads import Sources

from lora_cli import io_ops

MODELS = {
    "float32": "models/smollm2-135m-instruct",
    "bfloat16": "models/smollm2-135m-instruct-bf16",
}


def main() -> None:
    """Every workload in both types."""
    parser = argparse.ArgumentParser(description="peak memory of this tool on the benchmark's workloads")
    parser.add_argument("--e2e", type=Path, default=ROOT.parent / "shared/data/e2e/train.jsonl")
    asked = parser.parse_args()
    texts = (ROOT / "data/reviews/train.jsonl", ROOT / "recipes/data/general.txt")
    path = HERE / "results" / f"peaks-{re.sub(r'[^a-z0-9]+', '-', device().lower()).strip('-')}.json"
    found: dict[str, dict[str, int]] = {}
    for dtype, model in MODELS.items():
        sources = Sources(AutoTokenizer.from_pretrained(model), asked.e2e, texts)
        with tempfile.TemporaryDirectory() as folder:
            benchmark = Benchmark(model, sources, Path(folder), Path(folder) / "unused.json")
            for workload in workloads.CPU:
                workloads.write(workload, sources, benchmark.rows_of(workload))
                peak = benchmark.run("ours", workload)["peak_rss_bytes"]
                found.setdefault(workload.name, {})[dtype] = peak
                print(f"{workload.name} {dtype}: {peak / 1e6:,.0f} MB", flush=True)
                io_ops.write_json(path, {"device": device(), "peak_rss_bytes": found})


if __name__ == "__main__":
    main()
