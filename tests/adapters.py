"""Adapters of every kind on tiny models, every tensor random, so that nothing is hidden by a zero."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lora_cli import model as models
from lora_cli import parts
from lora_cli.adapter import files, inject, plan, rules
from lora_cli.adapter.inject import Adapter
from lora_cli.recipe.schema import AdapterRecipe
from tests import tiny

SHIFTS = [
    name
    for name in parts.names("init")
    if rules.SHIFTED in rules.of_part("init", name)
    and "base.quantized" not in rules.stated("needs", "init", parts.Part(name))
]
"""Starts that subtract what they add, of a base that is not quantised."""
TIED: dict[str, Any] = {"config": {"tie_word_embeddings": True}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {}),
    "conv1d": ("gpt2", {}),
    "bias of B": ("gpt2", {"lora_bias": True}),
    "embedding": ("llama", {"target_modules": ("embed_tokens", "q_proj")}),
    "embedding and head": ("llama", {"target_modules": ("embed_tokens", "lm_head")}),
    "scaled embedding, untied": (
        "gemma3_text",
        {"target_modules": ("embed_tokens", "q_proj"), "untie": True},
    ),
    "head, untied": ("gpt2", {"target_modules": ("lm_head", "c_attn"), "untie": True}),
    "lookup, untied": ("gpt2", {"target_modules": ("wte", "c_fc"), "untie": True}),
    "patterns": ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.*v_proj": 3.0}}),
    "rslora": ("llama", {"scale": "rslora", "r": 6, "rank_pattern": {"down_proj": 3}}),
    "lora_fa": ("gpt2", {"trainable": "lora_fa"}),
    "some layers": ("llama", {"layers": (1,)}),
    "norms": ("llama", {"train_also": ("norms",)}),
    "biases": ("gpt2", {"train_also": ("biases",)}),
    "biases and bias of B": ("gpt2", {"train_also": ("biases",), "lora_bias": True}),
    "norms, biases": ("gpt2", {"train_also": ("norms", "biases")}),
    "head in full": ("llama", {"train_also": ("head",)}),
    "head in full, untied": ("llama", {"train_also": ("head",), "untie": True, **TIED}),
    "both ends in full": ("llama", {"train_also": ("embeddings", "head")}),
    "both ends in full, tied": ("llama", {"train_also": ("embeddings", "head"), **TIED}),
    "both ends in full, untied": ("llama", {"train_also": ("embeddings", "head"), "untie": True, **TIED}),
    "a block in full": ("llama", {"train_also": ("layers.1.mlp",), "target_modules": ("q_proj",)}),
    "a module of modules in full": (
        "mamba",
        {"train_also": ("layers.0.mixer",), "target_modules": ("layers.1.mixer.in_proj",)},
    ),
    "new rows": ("llama", {"new_rows": (7, 200)}),
    "new rows, tied": ("gpt2", {"new_rows": (7, 200, 3)}),
    "new rows, tied, scaled": ("gemma3_text", {"new_rows": (7, 200)}),
    "new rows, untied": ("gpt2", {"new_rows": (7, 200), "untie": True}),
}


def base(kind: str, settings: dict[str, Any]) -> PreTrainedModel:
    """The plain model that a case is on, as it is on disk."""
    return tiny.model(kind, **settings.get("config", {}))


def adapted(
    kind: str,
    *,
    config: dict[str, Any] | None = None,
    untie: bool = False,
    new_rows: tuple[int, ...] = (),
    size: float = 0.1,
    **adapter: Any,
) -> tuple[PreTrainedModel, Adapter]:
    """A tiny model with an active adapter; its tensors are N(0, size²)."""
    model = tiny.model(kind, **(config or {}))
    if untie:
        models._untie(model)
    recipe = AdapterRecipe(**{"r": 4, "alpha": 8, **adapter})
    made = inject.inject(model, plan.make(recipe, model, models.ends_of(model), new_rows, untied=untie))
    with torch.no_grad():
        for parameter in made.named_tensors().values():
            parameter.copy_(torch.randn_like(parameter) * size)
    return model, made


def ids(rows: int = 2, length: int = 9) -> torch.Tensor:
    """Random token ids, among them those of `new_rows`."""
    drawn = torch.randint(5, tiny.VOCABULARY, (rows, length))
    drawn[0, :3] = torch.tensor((7, 200, 3))
    return drawn


def put_on(model: PreTrainedModel, folder: Path) -> Adapter:
    """The adapter of a folder on a model."""
    saved = files.read(folder)
    adapter = inject.inject(model, files.plan_of(saved, model, models.ends_of(model)))
    files.fill(adapter, saved)
    return adapter
