"""What fine-tuning costs, from 1B to 405B, predicted: the tables of README. No weights, no GPU; a minute.

.venv/bin/python scripts/estimate_table.py
"""

import tempfile
from pathlib import Path

import torch
from shapes import SHAPES, write

from lora_cli.analyze.devices import GPUS
from lora_cli.analyze.duration import computed_pairs, seconds
from lora_cli.analyze.memory import Case, memory, sharded, stored
from lora_cli.analyze.rehearse import Rows, rehearsal
from lora_cli.analyze.tally import Work
from lora_cli.recipe.schema import Recipe
from lora_cli.run import prepare

LENGTH, BUDGET = 2048, 8192
"""Tokens of a document, every one learned, and tokens at once."""
DEVICE = GPUS["H100"]


def line(name: str, folder: Path) -> str:
    """Peaks in GiB with r 16 on all linear layers, and tokens/s of one H100."""
    recipe = Recipe.model_validate(
        {
            "model": {"name": write(name, folder / name)},
            "data": {"train": "unread"},
            "train": {"max_steps": 1},
        }
    )
    rows, kind = Rows((LENGTH,) * (BUDGET // LENGTH), BUDGET, packed=True), torch.bfloat16
    with rehearsal(
        recipe, lambda made: prepare.plan_for(recipe, made), stored=kind, precision=kind
    ) as rehearsed:
        blocks = len(rehearsed.blocks)
        kept = memory(rehearsed, Case(rows, several=True, recomputed=0), DEVICE)
        again = memory(rehearsed, Case(rows, several=True, recomputed=blocks), DEVICE)
        speeds = [_speed(rehearsed.cost(rows, count).work, rows) for count in (0, blocks)]
        weights = sum(p.numel() for p in {id(p): p for p in rehearsed.model.parameters()}.values())
        peaks = [
            kept.weights,
            kept.peak,
            again.peak,
            stored(again, rehearsed, "nf4").peak,
            sharded(again, rehearsed, 8).peak,
        ]
    cells = [name, f"{weights / 1e9:.2f}B", *(f"{peak / 2**30:.1f}" for peak in peaks)]
    return " | ".join([*cells, *(f"{speed:,.0f}" for speed in speeds)])


def _speed(work: dict[str, Work], rows: Rows) -> float:
    return rows.cells / seconds(
        work["blocks"] + work["head"], DEVICE, "bfloat16", computed_pairs(DEVICE, rows.lengths)
    )


def main() -> None:
    """Print the table."""
    head = "model | with adapter | weights | peak | all blocks recomputed | and base in NF4 | "
    head += "all recomputed, fsdp on 8 | tokens/s, H100 | recomputed"
    print(f"| {head} |\n|{' --- |' * 9}")
    with tempfile.TemporaryDirectory() as folder:
        for name in SHAPES:
            print(f"| {line(name, Path(folder))} |", flush=True)


if __name__ == "__main__":
    main()
