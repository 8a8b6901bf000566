"""Adapters of experts that were taken apart are merged into the files that have them fused, or one by one."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lora_cli import experts, stored
from lora_cli import model as models
from lora_cli.adapter import files, inject, plan
from lora_cli.errors import ExitCode, UserError
from lora_cli.model import DTYPES
from lora_cli.recipe.schema import AdapterRecipe
from lora_cli.run import rewrite
from lora_cli.run.merge import merge
from lora_cli.run.open import open_model
from lora_cli.screen import Screen
from tests import tiny
from tests.adapters import ids
from tests.disk import Disk, failing
from tests.test_experts import mixture
from tests.test_merge import refused
from tests.test_merge_streamed import assert_same, save_adapter, streamed
from tests.training import distance

SCREEN = Screen()
LAYOUTS = ("mixtral", "qwen3_moe", "mixtral, fused", "gpt_oss")
"""The first two have one tensor an expert in their files; the fused weights of the last are transposed."""
ADAPTERS: dict[str, dict[str, Any]] = {
    "all experts": {"target_modules": ("gate_up_proj", "down_proj")},
    "some experts": {"target_modules": r".*layers\.1.*experts\.[02]\.down_proj"},
    "all-linear": {},
    "dora": {"method": "dora"},
    "oft": {"method": "oft", "target_modules": ("gate_up_proj", "q_proj")},
    "experts in full": {"target_modules": ("q_proj",), "train_also": ("layers.1.mlp",)},
    "other experts": {"target_modules": ("q_proj", "v_proj"), "layers": (0,)},
}


@pytest.fixture(autouse=True)
def _other_numbers_in_every_session():
    torch.manual_seed(random.getrandbits(48))


def save_base(folder: Path, layout: str, dtype: str, **config: Any) -> dict[str, Tensor]:
    """A mixture in files of the layout; what they hold."""
    kind, _, fused = layout.partition(", ")
    model = mixture(kind, **config).to(DTYPES[dtype])
    model.save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    path = folder / "base" / "model.safetensors"
    if fused:
        kept = {n: t for n, t in load_file(path).items() if ".experts." not in n}
        whole = {n: t.detach().contiguous() for n, t in model.named_parameters() if ".experts." in n}
        save_file(kept | whole, path, metadata={"format": "pt"})
    return load_file(path)


def save_split(
    folder: Path, layout: str, dtype: str = "float32", config: dict[str, Any] | None = None, **adapter: Any
) -> dict[str, Tensor]:
    """The base, and an adapter of it with its experts apart."""
    W0 = save_base(folder, layout, dtype, **(config or {}))
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    experts.split(model)
    made = plan.make(AdapterRecipe(**{"r": 4, **adapter}), model, models.ends_of(model))
    save_adapter(folder, inject.inject(model, made))
    return W0


def merged_in_memory(folder: Path, dtype: str | None, kind: str) -> dict[str, Tensor]:
    """Parameter -> what it is in a model that was loaded, taken apart, merged and put together again."""
    opened = open_model([folder / "adapter"], dtype=kind)
    (adapter,) = opened.adapters.values()
    inject.merge(opened.language.model, adapter, None if dtype is None else DTYPES[dtype])
    experts.join(opened.language.model)
    found = {name: p.detach() for name, p in opened.language.model.named_parameters()}
    return found if dtype is None else {name: p.to(DTYPES[dtype]) for name, p in found.items()}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize(
    "layouts", [("mixtral", "qwen3_moe"), ("mixtral, fused", "gpt_oss")], ids=["apart", "fused"]
)
def test_experts_are_merged_to_the_bits_of_the_whole_model_at_once(tmp_path, monkeypatch, layouts, adapter):
    layout = random.choice(layouts)
    kind, dtype = random.choice(["float32", "bfloat16"]), random.choice([None, "float32", "bfloat16"])
    W0 = save_split(tmp_path, layout, kind, **ADAPTERS[adapter])
    monkeypatch.setattr(stored, "BLOCK", random.choice([64, 1 << 24]))
    monkeypatch.setattr(rewrite, "SHARD", random.choice([20_000, 10**9]))
    found = streamed(tmp_path, dtype)
    assert found.keys() == W0.keys(), "in the layout of the base"
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in W0.items()}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / f"merged {dtype}", dtype="auto")
    expected = merged_in_memory(tmp_path, dtype, "float32" if dtype == "float32" else kind)
    assert_same({name: p.detach() for name, p in again.named_parameters()}, expected)
    changed = [name for name in W0 if not torch.equal(found[name], W0[name].to(found[name].dtype))]
    assert changed
    assert adapter != "some experts" or len(changed) == (2 if layout in LAYOUTS[:2] else 1), (
        "and nothing else"
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_expert_gets_its_own_change_and_no_other(tmp_path, layout):
    """The definition, slice by slice, in float64: s·B·A of an expert, transposed where the fused weight is."""
    save_split(tmp_path, layout, target_modules=("gate_up_proj", "down_proj"), alpha=6.0)
    saved = files.read(tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    report = merge(tmp_path / "adapter", tmp_path / "merged", None, SCREEN)
    merged = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").named_parameters())
    for name, W0 in plain.named_parameters():
        if name.rpartition(".")[2] not in experts.MATRICES:
            assert torch.equal(merged[name], W0), name
            continue
        block, _, matrix = name.rpartition(".")
        for number in range(4):
            key = f"base_model.model.{block}.{number}.{matrix}.lora_"
            delta = 1.5 * saved.tensors[f"{key}B.weight"].double() @ saved.tensors[f"{key}A.weight"].double()
            delta = delta.t() if layout == "gpt_oss" else delta
            torch.testing.assert_close(
                merged[name][number].double(), W0[number].double() + delta, rtol=1e-6, atol=1e-6
            )
            assert f"{block}.{number}.{matrix}" in report["layer_losses"]
    assert report["layer_error"] <= report["tolerance"]


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_target_parameters_of_peft_are_merged_as_peft_merges_them(tmp_path, layout):
    import peft

    save_base(tmp_path, layout, "float32")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=targets)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", None, SCREEN)
    x, merged = ids(), AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    live = theirs(x).logits
    assert distance(merged(x).logits, live) < 2e-6
    whole = dict(theirs.merge_and_unload().named_parameters())
    for name, W in merged.named_parameters():
        torch.testing.assert_close(W, whole[name], rtol=1e-5, atol=1e-6)


def test_a_bias_of_experts_that_trains_is_merged_beside_its_weight(tmp_path):
    save_split(tmp_path, "gpt_oss", target_modules=("gate_up_proj", "down_proj"), lora_bias=True)
    opened, x = open_model([tmp_path / "adapter"]), ids()
    merge(tmp_path / "adapter", tmp_path / "merged", None, SCREEN)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert distance(merged(x).logits, opened.language.model(x).logits) < 1e-5
    before, after = (load_file(tmp_path / each / "model.safetensors") for each in ("base", "merged"))
    assert not torch.equal(before[(name := "model.layers.0.mlp.experts.gate_up_proj_bias")], after[name])


def test_weights_and_biases_of_experts_keep_their_types(tmp_path):
    W0 = save_split(
        tmp_path, "gpt_oss", "bfloat16", target_modules=("gate_up_proj", "down_proj"), lora_bias=True
    )
    mixed = {name: W.float() if name.endswith("proj_bias") else W for name, W in W0.items()}
    save_file(mixed, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    found = streamed(tmp_path)
    assert {name: W.dtype for name, W in found.items()} == {name: W.dtype for name, W in mixed.items()}
    expected = merged_in_memory(tmp_path, None, "float32")
    for name, W in found.items():
        torch.testing.assert_close(W, expected[name].to(W.dtype), rtol=1e-6, atol=1e-6)


def test_experts_in_a_layout_that_is_not_known_are_refused(tmp_path, monkeypatch):
    save_split(tmp_path, "mixtral")
    monkeypatch.setattr(stored, "MergeModulelist", type("Other", (), {}))
    error = refused(tmp_path / "adapter", tmp_path / "merged", ExitCode.MODEL)
    assert "not those of single experts" in str(error)


def test_a_merge_that_mixes_up_experts_is_not_done(tmp_path, monkeypatch):
    save_split(tmp_path, "mixtral")
    right = inject.merge

    def wrong(model: Any, adapter: Any, into: Any) -> Any:
        for name, delta in adapter.deltas.items():
            delta.scale *= 1.001 if name.endswith("experts.2.down_proj") else 1
        return right(model, adapter, into)

    monkeypatch.setattr(inject, "merge", wrong)
    error = refused(tmp_path / "adapter", tmp_path / "merged", ExitCode.VERIFICATION)
    assert "experts.2.down_proj is" in str(error)


@pytest.mark.parametrize("layout", ["mixtral", "gpt_oss"])
def test_a_merge_that_is_refused_at_any_operation_on_a_file_leaves_nothing(tmp_path, layout):
    save_split(tmp_path, layout, layers=(0,), target_modules=("down_proj",))
    root = tmp_path / "root"
    root.mkdir()
    whole = Disk(root)
    with whole.watched():
        merge(tmp_path / "adapter", root / "merged", None, SCREEN)
    shutil.rmtree(root / "merged")
    renames = [number for number, each in enumerate(whole.log) if each.kind == "rename"]
    for number in random.sample(range(renames[-1]), 3):
        with pytest.raises(UserError) as caught, Disk(root, before=failing(number)).watched():
            merge(tmp_path / "adapter", root / "merged", None, SCREEN)
        assert caught.value.code == ExitCode.DISK
        assert list(root.iterdir()) == []
