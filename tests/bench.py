"""Runs of a tiny model that are disturbed, and what they have to give all the same."""

import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

from lora_cli import io_ops
from lora_cli.recipe.dump import to_yaml
from lora_cli.recipe.schema import Recipe
from lora_cli.run.folder import RunFolder
from lora_cli.run.train import train
from lora_cli.screen import Screen
from lora_cli.train import checkpoint
from tests import tiny
from tests.test_train_run import stable

LONG = bool(os.environ.get("LORA_LONG"))
SMALL = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}
STATED = {
    "epochs": 2, "batch_size": 4, "micro_batch_size": 3, "learning_rate": 1e-2, "save_steps": 2
}  # fmt: skip


def often(small: int, large: int) -> int:
    """A count of draws."""
    return large if LONG else small


class Bench:
    """A tiny model with rows, recipes for it, and what an undisturbed run makes of them."""

    def __init__(self, folder: Path) -> None:
        """Six steps with dropout, shuffling, accumulation and a ragged last step in each epoch; a fresh model."""
        self.folder, self.number = folder, 0
        tiny.model("llama", random.getrandbits(16), **SMALL).save_pretrained(folder / "model")
        tiny.tokenizer().save_pretrained(folder / "model")
        rows = [{"question": f"{a}+{b}", "answer": str(a + b)} for a in range(4) for b in range(3)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        whole = self.recipe("whole")
        train(whole, Screen())
        self.expected = result(whole)

    def recipe(self, name: str = "", **sections: dict[str, Any]) -> Recipe:
        """`section={key: value}` adds to what is stated."""
        self.number += 1
        found: dict[str, dict[str, Any]] = {
            "model": {"name": str(self.folder / "model"), "dtype": "float32"},
            "data": {
                "train": str(self.folder / "rows.jsonl"),
                "eval_fraction": 0.25,
                "format": {"prompt": "{question}", "completion": "{answer}"},
            },
            "adapter": {"r": 2, "dropout": 0.1},
            "train": dict(STATED),
            "output": {"dir": str(self.folder / (name or f"run{self.number}"))},
        }
        for section, values in sections.items():
            found.setdefault(section, {}).update(values)
        return Recipe.model_validate(found)

    def file(self, recipe: Recipe) -> Path:
        """The recipe on disk, for the command line."""
        path = root_of(recipe).with_suffix(".yaml")
        path.write_text(to_yaml(recipe))
        return path


def root_of(recipe: Recipe) -> Path:
    return Path(str(recipe.output.dir))


def result(recipe: Recipe) -> tuple[str, list[dict[str, Any]]]:
    """Hash of the adapter, and what of the log does not depend on the clock."""
    root = root_of(recipe)
    weights = (root / "adapter" / "adapter_model.safetensors").read_bytes()
    return hashlib.sha256(weights).hexdigest(), stable(RunFolder(root).lines())


def leftovers(root: Path) -> list[Path]:
    return list(root.rglob(f"{io_ops.TEMPORARY}*"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def good(checkpoints: Path) -> list[str]:
    """Names of the checkpoints that verify, oldest first."""
    return [path.name for path in checkpoint._all(checkpoints) if checkpoint.damage(path) is None]


def resumed(recipe: Recipe) -> tuple[str, list[dict[str, Any]]]:
    train(recipe, Screen(), resume=True)
    assert not leftovers(root_of(recipe))
    return result(recipe)
