"""What fine-tuning costs, from 1B to 405B, predicted: the table of README. No weights, no GPU.

    .venv/bin/python scripts/estimate_table.py

For each model, way to train it and GPU: on how few it fits, and how fast it is there.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import readme
import torch
from shapes import SHAPES, write

from lora_cli.analyze.devices import GPUS, Device
from lora_cli.analyze.memory import Case
from lora_cli.analyze.rehearse import Rehearsal, Rows, rehearsal
from lora_cli.recipe.schema import Recipe
from lora_cli.run import prepare
from lora_cli.run.advice import DEVICES, kept_in, way
from lora_cli.run.estimate import pace

LENGTH, BUDGET, BATCHES = 2048, 8192, 4
"""Tokens of a document, every one learned; tokens at once; and how often that in a step of one GPU."""
MODELS = {
    "Llama-3.2-1B": 1.24e9,
    "Llama-3.2-3B": 3.21e9,
    "Llama-3.1-8B": 8.03e9,
    "Qwen2.5-14B": 14.8e9,
    "Qwen2.5-32B": 32.8e9,
    "Llama-3.1-70B": 70.6e9,
    "Llama-3.1-405B": 406e9,
}
"""Model -> its parameters, as published."""
DEVICE_NAMES = ("H100", "A100", "4090", "L4")
WAYS: dict[str, tuple[dict[str, Any], str | None]] = {
    "LoRA": ({"r": 16}, None),
    "QLoRA, nf4": ({"r": 16}, "nf4"),
    "full": ({"method": "full"}, None),
}
"""What it is called -> the adapter, and how the base is kept."""


def rows(name: str, folder: Path) -> Iterator[str]:
    """The lines of a model."""
    config = write(name, folder / name)
    for way_name, (adapter, kind) in WAYS.items():
        if kind is not None:
            continue  # with the one that it is a variant of
        with _rehearsed(config, adapter) as found:
            _check_size(name, found)
            yield _line(name, way_name, found, share=adapter.get("method") != "full")
            for other, (same, bits) in WAYS.items():
                if same == adapter and bits is not None:
                    yield _line(name, other, kept_in(found, bits), share=True)


def _rehearsed(config: str, adapter: dict[str, Any]) -> Any:
    recipe = Recipe.model_validate(
        {
            "model": {"name": config},
            "data": {"train": "unread"},
            "train": {"max_steps": 1},
            "adapter": adapter,
        }
    )
    kind = torch.bfloat16
    cuda = torch.device("cuda")
    return rehearsal(
        recipe, lambda made: prepare.plan_for(recipe, made), stored=kind, precision=kind, device=cuda
    )


def _check_size(name: str, found: Rehearsal) -> None:
    """That the shapes are those of the model that they are called after."""
    own = {id(p) for p in found.adapter.named_tensors().values()}
    base = {id(p): p for p in found.model.parameters() if id(p) not in own}
    base |= {id(p): p for p in found.adapter.originals.values()}
    count = sum(p.numel() for p in base.values())
    assert abs(count / MODELS[name] - 1) < 0.01, f"{name} has {count:,} parameters"


def _line(name: str, way_name: str, found: Rehearsal, *, share: bool) -> str:
    cells = [_cell(found, GPUS[device], share) for device in DEVICE_NAMES]
    return f"| {' | '.join([name, way_name, *cells])} |"


def _cell(found: Rehearsal, device: Device, share: bool) -> str:
    """GPUs, tokens/s of all of them, and what it takes to fit."""
    packed = Rows((LENGTH,) * (BUDGET // LENGTH), BUDGET, packed=True)
    for count in (1, *(DEVICES if share else ())):
        fitting = way(found, Case(packed, several=True, recomputed=0), device, count)
        if fitting is None:
            continue
        case, _ = fitting
        steps = [[case.rows] * (BATCHES * BUDGET // case.rows.cells)]
        speed = pace(found, case, steps, device, count, count > 1)
        assert speed is not None, "all of the table are known"
        again = f" ↻{case.recomputed}" if case.recomputed else ""
        fewer = f" ½{case.rows.cells:,}" if case.rows != packed else ""
        return f"{count}: {float(f'{speed.tokens_per_second:.3g}'):,.0f}{again}{fewer}"
    return "–"


def main() -> None:
    """Write the table between its markers in README, and show it."""
    lines = [f"| model | | {' | '.join(DEVICE_NAMES)} |", f"|{' --- |' * (2 + len(DEVICE_NAMES))}"]
    print("\n".join(lines))
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            assert name in SHAPES
            for line in rows(name, Path(folder)):
                lines.append(line)
                print(line, flush=True)
    if "--print" not in sys.argv:
        readme.write("estimates", "scripts/estimate_table.py", "\n".join(lines))


if __name__ == "__main__":
    main()
