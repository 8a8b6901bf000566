"""Tiny models, adapters and rows in folders, as the commands after training find them."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from lora_cli import model as models
from lora_cli.adapter import files
from lora_cli.adapter import plan as plans
from lora_cli.adapter.inject import inject
from lora_cli.recipe.schema import AdapterRecipe
from tests import tiny

PLAIN = {"format": {"prompt": "Review: {text}\nMood:", "completion": " {label}"}, "chat_template": "none"}


def model(folder: Path, kind: str = "llama", seed: int = 0, chat_template: str | None = tiny.CHATML) -> Path:
    """A model folder."""
    tiny.model(kind, seed).save_pretrained(folder)
    tiny.tokenizer(chat_template).save_pretrained(folder)
    return folder


def rows(file: Path, *values: dict[str, Any]) -> Path:
    """A jsonl file."""
    file.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return file


def recipe(file: Path, base: Path, data: dict[str, Any], **sections: Any) -> Path:
    """A recipe file."""
    content = {"model": {"name": str(base), "dtype": "float32"}, "data": data, **sections}
    file.write_text(yaml.safe_dump(json.loads(json.dumps(content, default=str))), encoding="utf-8")
    return file


def adapter(run: Path, base: Path, seed: int, data: dict[str, Any] | None = None, **sections: Any) -> Path:
    """A run folder whose adapter has random factors; with `data` also the recipes that a finished run has."""
    kind = json.loads((base / "config.json").read_text())["model_type"]
    made = tiny.model(kind)
    settings = AdapterRecipe(**{"r": 4, **sections.pop("adapter", {})})
    on_model = inject(made, plans.make(settings, made, models.ends_of(made)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in on_model.named_tensors().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    folder = run / "adapter"
    folder.mkdir(parents=True)
    files.save(folder, on_model, str(base), None)
    if data is not None:
        for where in (run, folder):
            recipe(where / "recipe.yaml", base, data, **sections)
    return run
