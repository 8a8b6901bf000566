"""Long data: mixtures in their proportions and resumed exactly, a start that rows do not slow, no copy of the Hub."""

import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from lora_cli.data import load, tables
from lora_cli.data.cache import Examples
from lora_cli.data.example import Example
from lora_cli.data.pack import epoch_length, epoch_order
from lora_cli.errors import UserError
from lora_cli.recipe.schema import DataRecipe, Recipe, WeightedSource
from lora_cli.run.train import train
from lora_cli.screen import Screen
from lora_cli.train import loop
from tests import tiny
from tests.test_data_pack import Weighted
from tests.test_train_run import stopped_after

SEED = random.getrandbits(31)

# Mixtures


def mixture(counts: list[int], weights: list[float]) -> Weighted:
    """Examples of some sources, one source behind the other, as they lie in a cache."""
    return Weighted(np.repeat(np.arange(len(counts)), counts).tolist(), tuple(weights))


def drawn(examples: Weighted, order: np.ndarray) -> np.ndarray:
    """How many of each source."""
    return np.bincount(examples.sources[order], minlength=len(examples.weights))


def test_whole_weights_are_kept_exactly_in_every_epoch():
    counts = [random.randint(1, 60) for _ in range(random.randint(1, 5))]
    weights = [random.randint(1, 6) for _ in counts]
    examples = mixture(counts, [float(weight) for weight in weights])
    for epoch in range(5):
        order = epoch_order(examples, SEED, epoch)
        times = np.bincount(order, minlength=len(examples))
        assert times.tolist() == np.repeat(weights, counts).tolist(), (
            "each example as often as its source weighs"
        )
        assert len(order) == epoch_length(examples) == int(np.dot(counts, weights))


def test_weights_in_part_are_kept_to_one_example_in_every_epoch_and_evenly_over_them():
    counts = [random.randint(40, 90) for _ in range(4)]
    weights = [random.choice([0.1, 0.25, 0.3, 0.5, 1.7, 2.25]) for _ in counts]
    examples = mixture(counts, weights)
    epochs = [epoch_order(examples, SEED, epoch) for epoch in range(20)]
    for order in epochs:
        assert np.abs(drawn(examples, order) - np.multiply(counts, weights)).max() <= 0.5
    times = np.bincount(np.concatenate(epochs), minlength=len(examples))
    for source in range(len(counts)):
        of = times[examples.sources == source]
        assert of.max() - of.min() <= 1, "none comes again before the others have come"


def test_every_stretch_of_an_epoch_is_a_fair_draw():
    """A run may end within its first epoch: chi-square over the first rows of epochs with fresh seeds.

    Of three sources there are two degrees of freedom, where P(chi² > c) = exp(-c/2) exactly; drawn without putting
    back, the counts spread less than that.
    """
    counts, weights = [700, 200, 450], [0.5, 3.0, 1.0]
    examples = mixture(counts, weights)
    share = np.multiply(counts, weights) / np.dot(counts, weights)
    limit = -2 * math.log(1e-7)
    found = np.zeros((4, 3))
    for trial in range(150):
        order = epoch_order(examples, random.getrandbits(31), trial)
        found += [drawn(examples, stretch[:100]) for stretch in np.array_split(order, 4)]
    for observed in found:
        expected = share * observed.sum()
        assert ((observed - expected) ** 2 / expected).sum() < limit
    wrong = np.multiply(counts, 1.0) / sum(counts)  # the test would see weights that are passed over
    assert ((found[0] - wrong * 15_000) ** 2 / (wrong * 15_000)).sum() > limit


@pytest.fixture
def recipe(tiny_folder: Path, tmp_path: Path):
    """Make a recipe with a mixture of three files, weighted 2, 1 and 0.5."""
    data = []
    for name, count, weight in (("a", 9, 2.0), ("b", 14, 1.0), ("c", 10, 0.5)):
        path = tmp_path / f"{name}.jsonl"
        rows = [{"prompt": f"{name} {i}?", "completion": f"{i} {name}"} for i in range(count)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data.append({"path": str(path), "weight": weight})

    def make(output: str) -> Recipe:
        return Recipe.model_validate(
            {
                "model": {"name": str(tiny_folder), "dtype": "float32"},
                "data": {"train": data},
                "adapter": {"r": 4, "dropout": 0.1},
                "train": {"epochs": 3, "batch_size": 5, "micro_batch_size": 2, "save_steps": 2},
                "output": {"dir": str(tmp_path / output)},
            }
        )

    return make


def test_a_run_on_a_mixture_learns_it_in_its_proportions_and_goes_on_to_the_bit(recipe, monkeypatch):
    """Stopped anywhere, at the ragged end of an epoch too, the resumed run sees the rows that were left, no others."""
    seen: list[tuple[int, list[int]]] = []
    real = loop.Training.rows

    def noting(self: loop.Training, step: int) -> list[int]:
        rows = real(self, step)
        seen.append((step, [int(self.examples.sources[row]) for row in rows]))
        return rows

    def adapter(folder: Path) -> str:
        return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()

    monkeypatch.setattr(loop.Training, "rows", noting)
    whole = adapter(train(recipe("whole"), Screen()))
    steps = dict(seen)
    assert len(steps) == 3 * math.ceil((18 + 14 + 5) / 5) == 24
    for epoch in range(3):
        of = [source for step in range(8 * epoch, 8 * epoch + 8) for source in steps[step]]
        assert [of.count(source) for source in range(3)] == [18, 14, 5]
    for stop in random.sample(range(1, 24), 3):
        seen.clear()
        with monkeypatch.context() as patched:
            stopped_after(patched, stop)
            with pytest.raises(UserError, match=f"stopped after step {stop}"):
                train(recipe(f"stopped {stop}"), Screen())
        assert dict(seen) == {step: steps[step] for step in range(stop)}
        seen.clear()
        assert adapter(train(recipe(f"stopped {stop}"), Screen(), resume=True)) == whole
        assert dict(seen) == {step: steps[step] for step in range(stop, 24)}


# The start


def test_what_a_run_needs_before_its_first_step_touches_no_row(tmp_path):
    """Opened, measured against the model, its steps counted: all from the index, however many rows there are."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "{i}?", "completion": "{"y" * i}"}}\n' for i in range(1, 41)))
    data = DataRecipe.model_validate({"train": str(path), "max_length": 40, "overflow": "truncate"})
    folder = load.load(data, tiny.tokenizer(), cache=tmp_path / "cache", seed=0).train.folder
    opened = Examples(folder, (1.5,))
    assert opened.longest == int(opened.lengths.max()) == 40
    assert opened.counts.longest > 40, "what it was before it was cut"
    assert opened.of_source == (len(opened),)
    length = len(epoch_order(opened, SEED, 0))
    opened._rows = opened._offsets = opened._ids = opened._trained = None  # type: ignore[assignment]
    assert epoch_length(opened) == length == 60


# The Hub


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A dataset of parquet or JSON files that an id on the Hub stands for, read by the code that reads the Hub."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "copies")
    folder = tmp_path / "elsewhere"
    real = tables.Hub.__init__

    def here(self: tables.Hub, source: WeightedSource, split: str) -> None:
        real(self, source, split)
        self.name = str(folder)

    monkeypatch.setattr(tables.Hub, "__init__", here)

    def make(kind: str, rows: list[dict[str, Any]]) -> int:
        folder.mkdir()
        for number in range(3):
            some = rows[number::3]
            path = folder / f"train-0000{number}-of-00003.{kind}"
            if kind == "parquet":
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(some), path, compression="none")
            else:
                path.write_text("".join(json.dumps(row) + "\n" for row in some))
        return sum(path.stat().st_size for path in folder.iterdir())

    return make


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_dataset_on_the_hub_goes_into_the_cache_without_a_copy_of_it(tmp_path, published, kind):
    """Its rows pass by, and their tokens stay."""
    rows = [{"text": f"{i} {'long ' * 400}"} for i in range(4_000)]
    total = published(kind, rows)
    assert total > 8e6
    recipe = {"train": "somebody/something", "eval_fraction": 0.1, "max_length": 4096}
    data = DataRecipe.model_validate(recipe)

    def examples(self: load.Format, row: Any) -> list[Example]:
        """Stands for a tokenizer: this is about rows."""
        return [Example((1, int(row.values["text"].split()[0]) % 200, 2), (False, True, True), row.where)]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(load.Format, "examples", examples)
        found = load.load(data, tiny.tokenizer(), cache=tmp_path / "cache", seed=SEED)
    assert len(found.train) + len(found.eval or ()) == len(rows)
    assert size_of(tmp_path / "cache") < total / 10
    copies = tmp_path / "copies"
    assert not copies.exists() or size_of(copies) < total / 100
    order = sorted(range(len(rows)), key=lambda i: (i % 3, i))  # the files in their order
    expected = [order[i] % 200 for i in range(len(rows)) if not load.is_held_out(i, 0.1, SEED)]
    assert [found.train[i].input_ids[1] for i in range(len(found.train))] == expected
    assert found.train.where(0).startswith("somebody/something:")
