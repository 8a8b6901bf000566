"""`lora check`: everything that can be known before training. Nothing is trained, no weights are loaded."""

import dataclasses
import math
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.text import Text

from lora_cli import model as models
from lora_cli import presets
from lora_cli.adapter.plan import Plan
from lora_cli.data.cache import SHOWN
from lora_cli.data.example import Example
from lora_cli.data.load import Datasets
from lora_cli.model import LanguageModel
from lora_cli.recipe.dump import explained
from lora_cli.recipe.load import Loaded
from lora_cli.run import prepare
from lora_cli.screen import Screen, size


def check(loaded: Loaded, screen: Screen, rows: int) -> dict[str, Any]:
    """Validate the recipe, plan the adapter, tokenise the data, show `rows` examples; returns what was found."""
    recipe = loaded.recipe
    screen.heading(f"recipe {loaded.name}")
    screen.table(["key", "value", "from"], _with_preset(loaded))
    prepare.check_method(recipe)
    skeleton = models.skeleton(recipe.model)
    tokenizer = models.load_tokenizer(recipe.model)
    language = models.with_tokens(skeleton, tokenizer, recipe.model)
    plan = prepare.plan_for(recipe, language)
    show_plan(plan, language, screen)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(str(recipe.output.dir))
        cache = prepare.cache_folder(folder if folder.exists() else Path(scratch))
        datasets = prepare.load_data(recipe, language.tokenizer, cache)
        prepare.check_fit(language.model, datasets)
        show_data(datasets, screen)
        rejected = _rejected(datasets)
        for index in range(min(rows, len(datasets.train))):
            show_example(datasets.train[index], language.tokenizer, screen)
    return {
        "recipe": recipe.model_dump(),
        "layers": [dataclasses.asdict(spec) for spec in plan.layers],
        "trained_parameters": trained_parameters(plan, language),
        "train": dataclasses.asdict(datasets.train.counts),
        "eval": dataclasses.asdict(datasets.eval.counts) if datasets.eval else None,
        "rejected": rejected,
    }


def _with_preset(loaded: Loaded) -> list[tuple[str, str, str]]:
    """The resolved recipe; axes that it leaves to the method show the method's part."""
    recipe = loaded.recipe
    method = presets.resolve(recipe.adapter, recipe.train.optimizer, recipe.model.quantize)
    keys = {"optimizer": "train.optimizer", "base": "model.quantize"}
    left = {
        keys.get(axis, f"adapter.{axis}"): ", ".join(part.name for part in found) or "none"
        for axis, found in method.chosen().items()
    }
    own = {key: value for key, value, _ in explained(loaded)}
    whole = explained(replace(loaded, recipe=prepare.resolved(recipe)))
    return [
        (key, left[key], f"method {method.name}")
        if value == "null" and key in left
        else (key, value, origin if value == own[key] else f"method {method.name}")
        for key, value, origin in whole
    ]


def trained_parameters(plan: Plan, language: LanguageModel) -> int:
    """Numbers that will train: the adapter, what `train_also` adds, and the rows of new tokens."""
    known = dict(language.model.named_parameters(remove_duplicate=False))
    in_full = {id(known[name]) if plan.ends.tied else name: known[name].numel() for name in plan.also}
    embeddings = models.end_modules(language.model)[0]
    rows = len(plan.new_rows) * embeddings.embedding_dim * (1 if plan.ends.tied else 2)
    return plan.num_trainable + sum(in_full.values()) + rows


def show_plan(plan: Plan, language: LanguageModel, screen: Screen) -> None:
    """Which layers, grouped by the last piece of their name, and what share of the model trains."""
    screen.heading(f"plan: {plan.method.name}")
    groups: dict[tuple[Any, ...], int] = {}
    for spec in plan.layers:
        key = (spec.name.rpartition(".")[2], spec.out_features, spec.in_features, spec.r, spec.scale)
        groups[key] = groups.get(key, 0) + 1
    trainable = {spec.name.rpartition(".")[2]: spec.num_trainable for spec in plan.layers}
    if groups:
        screen.table(
            ["module", "layers", "out × in", "r", "scale", "trained"],
            [(n, count, f"{o}×{i}", r, s, count * trainable[n]) for (n, o, i, r, s), count in groups.items()],
        )
    if plan.shared_trained:
        shared = [
            (name, "×".join(map(str, shape)), math.prod(shape)) for name, shape in plan.shared_trained.items()
        ]
        screen.table(["shared by several layers", "shape", "trained"], shared)
    in_full = Counter(".".join(name.split(".")[-2:]) for name in plan.also)
    if in_full:
        screen.table(["trained in full", "tensors"], list(in_full.items()))
    if plan.method.base is not None:
        within = "" if plan.budget is None else f", in {plan.budget:g} bits a weight that training shares out"
        screen.note(f"{len(plan.quantised)} linear layers are kept in {plan.method.base.name}{within}")
    total = models.size_of(language.model)
    trained = trained_parameters(plan, language)
    screen.note(f"{size(trained)} of {size(total)} parameters train: {trained / total:.2%}")


def show_data(datasets: Datasets, screen: Screen) -> None:
    """How many rows were kept, cut and dropped, and how many tokens are learned."""
    screen.heading("data")
    found = [("train", datasets.train), ("eval", datasets.eval)]
    counted = [(name, dataclasses.asdict(each.counts)) for name, each in found if each is not None]
    screen.table(["", *counted[0][1]], [[name, *counts.values()] for name, counts in counted])
    rejected = _rejected(datasets)
    if rejected:
        screen.note(f"left out or cut, the first {SHOWN} of each:")
        for each in rejected:
            screen.note(f"  {each['where']}: {each['reason']}")


def _rejected(datasets: Datasets) -> list[dict[str, str]]:
    """The first rows of each split that are not learned as they stand, and why."""
    return [line for each in (datasets.train, datasets.eval) if each for line in each.rejected(SHOWN)]


def show_example(example: Example, tokenizer: Any, screen: Screen) -> None:
    """Decode an example with every trained stretch marked, in colour and with ⟦ ⟧ for those who see none."""
    screen.note(f"\n{example.where}: {len(example.input_ids)} tokens, {sum(example.trained)} trained")
    text = Text()
    for trained, ids in _stretches(example):
        piece = tokenizer.decode(ids)
        text.append(f"⟦{piece}⟧" if trained else piece, style="bold green" if trained else "dim")
    screen.text(text)


def _stretches(example: Example) -> list[tuple[bool, list[int]]]:
    """Neighbouring tokens of the same kind, together."""
    found: list[tuple[bool, list[int]]] = []
    for token, trained in zip(example.input_ids, example.trained, strict=True):
        if not found or found[-1][0] != trained:
            found.append((trained, []))
        found[-1][1].append(token)
    return found
