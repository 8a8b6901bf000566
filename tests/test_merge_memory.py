"""What a merge holds at a time, counted: as much of a deep model, or of many experts, as of a small one.

What it comes to in megabytes of a process is measured by scripts/bench/merge.py.
"""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_cli import model as models
from lora_cli import stored
from lora_cli.adapter import inject, plan
from lora_cli.recipe.schema import AdapterRecipe, ModelRecipe
from lora_cli.run import rewrite
from lora_cli.run.merge import merge
from lora_cli.screen import Screen
from tests import tiny
from tests.test_merge_experts import save_split
from tests.test_merge_quantised import WIDE
from tests.test_merge_streamed import save_adapter
from tests.test_methods_quantised import packed


@pytest.fixture(autouse=True)
def _blocks_that_are_small_beside_a_layer(monkeypatch):
    monkeypatch.setattr(stored, "BLOCK", 4096)


class Held(TorchDispatchMode):
    """Bytes of all tensors with contents that operations have met and that are alive: the most so far."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, made)):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return made


def llama(folder: Path, times: int, **recipe: Any) -> None:
    """A base of so many layers and a thin adapter on it."""
    tiny.model("llama", num_hidden_layers=times, **WIDE).save_pretrained(folder / "plain")
    tiny.tokenizer().save_pretrained(folder / "plain")
    if recipe.pop("stored", False):
        packed(folder / "plain", folder / "base", "nf4")
    else:
        (folder / "plain").rename(folder / "base")
    asked = ModelRecipe(name=str(folder / "base"), dtype="float32", **recipe)
    language = models.load(asked)
    made = plan.make(AdapterRecipe(r=1), language.model, language.ends, quantize=asked.quantize)
    save_adapter(folder, inject.inject(language.model, made))


def biases_first(folder: Path, times: int) -> None:
    """Fused experts in files of which the first has all that waits until what it is merged with is written."""
    W0 = save_split(folder, "gpt_oss", r=1, config={"num_local_experts": 2 * times})
    names = sorted(W0, key=lambda name: not name.endswith("_bias"))
    entries = [stored.Entry(name, W0[name].dtype, tuple(W0[name].shape)) for name in names]
    (folder / "base" / "model.safetensors").unlink()
    biases = sum(entry.size for entry in entries if entry.name.endswith("_bias"))
    stored.write(folder / "base", entries, lambda entry: [W0[entry.name]], biases)
    assert next(iter(stored.open_stored(ModelRecipe(name=str(folder / "base"))).entries)).endswith("_bias")


BASES: dict[str, Any] = {
    "dense": llama,
    "quantised in training": lambda folder, times: llama(folder, times, quantize="nf4"),
    "stored quantised": lambda folder, times: llama(folder, times, stored=True),
    "experts one by one": lambda folder, times: save_split(
        folder, "mixtral", r=1, config={"num_local_experts": 2 * times}
    ),
    "experts together": lambda folder, times: save_split(
        folder, "gpt_oss", r=1, config={"num_local_experts": 2 * times}
    ),
    "experts together, biases first": lambda folder, times: biases_first(folder, times),
    "experts left alone": lambda folder, times: save_split(
        folder, "mixtral", r=1, target_modules=("q_proj",), config={"num_local_experts": 2 * times}
    ),
}


def most_held(folder: Path, times: int, base: str, **how: Any) -> tuple[int, int]:
    """Bytes of tensors while merging, without those of the adapter, and bytes of the merged model."""
    folder.mkdir()
    BASES[base](folder, times)
    with Held() as held:
        merge(folder / "adapter", folder / "merged", "float32", Screen.silent(), **how)
    adapter = (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    return held.most - adapter, sum(path.stat().st_size for path in (folder / "merged").glob("*.safetensors"))


@pytest.mark.parametrize("base", BASES)
def test_a_model_of_three_times_the_size_takes_no_more_to_merge(tmp_path, base):
    small, large = (most_held(tmp_path / str(times), times, base) for times in (1, 3))
    grown = large[1] - small[1]
    assert grown > 100_000
    assert large[0] - small[0] < 0.05 * grown


def test_nor_onto_the_original_weights(tmp_path):
    small, large = (most_held(tmp_path / str(n), n, "quantised in training", onto="original") for n in (1, 3))
    assert large[0] - small[0] < 0.05 * (large[1] - small[1])


def test_what_is_held_is_counted(tmp_path, monkeypatch):
    """The count above sees it when what is merged is not let go of."""
    kept: list[Any] = []
    right = rewrite.merged
    monkeypatch.setattr(rewrite, "merged", lambda *all: kept.append(right(*all)) or kept[-1])
    small, large = (most_held(tmp_path / str(times), times, "dense") for times in (1, 3))
    assert large[0] - small[0] > 0.5 * (large[1] - small[1])
