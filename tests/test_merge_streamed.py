"""A model merged layer by layer, from file to file, is the model merged in memory, to the bit; or there is none."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_cli import io_ops, parts, presets, stored
from lora_cli import model as models
from lora_cli.adapter import files, inject, plan, rules
from lora_cli.errors import ExitCode, UserError
from lora_cli.model import DTYPES
from lora_cli.parts import Part
from lora_cli.presets import PRESETS
from lora_cli.recipe.schema import AdapterRecipe, ModelRecipe
from lora_cli.run import rewrite
from lora_cli.run.merge import merge
from lora_cli.run.open import open_model
from lora_cli.screen import Screen
from tests import tiny
from tests.adapters import CASES, adapted, base, ids
from tests.disk import Disk, Tree, failing, full_disk
from tests.test_methods_run import ADAPTER

SCREEN = Screen()


def save_base(folder: Path, model: Any, dtype: str, **more: Any) -> None:
    model.to(DTYPES[dtype]).save_pretrained(folder / "base", **more)
    tiny.tokenizer().save_pretrained(folder / "base")


def save_adapter(folder: Path, adapter: inject.Adapter, tokens: tuple[str, ...] = ()) -> None:
    with torch.no_grad():
        for name, parameter in adapter.named_tensors().items():
            if adapter.codes and ".fixed_" in name:
                continue  # what was taken off W0 before it was quantised
            parameter.copy_(torch.randn_like(parameter) * 0.05 + (parameter if parameter.ndim == 1 else 0))
    (folder / "adapter").mkdir()
    files.save(folder / "adapter", adapter, str(folder / "base"), None, tokens)


def merged_in_memory(folder: Path, dtype: str | None, kind: str) -> dict[str, torch.Tensor]:
    """What the files of a model hold that was loaded, merged and saved whole."""
    opened = open_model([folder / "adapter"], dtype=kind)
    (adapter,) = opened.adapters.values()
    model = opened.language.model
    inject.merge(model, adapter, None if dtype is None else DTYPES[dtype])
    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(DTYPES[dtype])
    ends = models.end_modules(model)
    model.config.tie_word_embeddings = ends[0].weight is ends[1].weight
    model.save_pretrained(folder / "whole")
    return load_file(folder / "whole" / "model.safetensors")


def streamed(folder: Path, dtype: str | None = None) -> dict[str, torch.Tensor]:
    output = folder / f"merged {dtype}"
    merge(folder / "adapter", output, dtype, SCREEN)
    found: dict[str, torch.Tensor] = {}
    for path in sorted(output.glob("*.safetensors")):
        found |= load_file(path)
    model, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.isfinite(model(ids()).logits).all()
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def planned(model: Any, **adapter: Any) -> inject.Adapter:
    made = plan.make(AdapterRecipe(**{"r": 4, **adapter}), model, models.ends_of(model))
    if hasattr(
        parts.load("init", made.method.init.name), "measures"
    ):  # what it starts from is all the same here
        made = replace(made, method=replace(made.method, init=Part(name="kaiming")))
    return inject.inject(model, made)


MERGEABLE = [name for name in PRESETS if rules.is_mergeable(presets.resolve(AdapterRecipe(method=name)))]


@pytest.mark.parametrize("method", MERGEABLE)
def test_every_method_gives_the_same_bits_layer_by_layer_as_the_whole_model_at_once(tmp_path, method):
    kind = random.choice(["float32", "bfloat16", "float16"])
    dtype = random.choice([None, "float32", "bfloat16", "float16"])
    # LongLoRA trains the embeddings, which a model with tied ends has to be asked for.
    named = ["llama", "qwen2"]  # ALoRA's settings name layers of theirs; Llama's have no biases
    kinds = {"longlora": named, "alora": named, "bitfit": ["gpt2", "qwen2"]}
    model = tiny.model(random.choice(kinds.get(method, ["llama", "gpt2", "qwen2"])))
    save_base(tmp_path, model, kind)
    save_adapter(tmp_path, planned(model.float(), method=method, **ADAPTER.get(method, {})))
    found = streamed(tmp_path, dtype)
    assert_same(found, merged_in_memory(tmp_path, dtype, "float32" if dtype == "float32" else kind))
    W0 = load_file(tmp_path / "base" / "model.safetensors")
    assert any(not torch.equal(found[name].float(), W0[name].float()) for name in W0), "something was merged"


@pytest.mark.parametrize("name", CASES)
def test_every_part_of_a_model_gives_the_same_bits(tmp_path, name):
    """Both ends, tied or not, new tokens, biases, norms, whole blocks: see tests/adapters.py."""
    kind, settings = CASES[name]
    stored_as = random.choice(["float32", "bfloat16"])
    save_base(tmp_path, base(kind, settings), stored_as)
    _, adapter = adapted(kind, **settings)
    save_adapter(tmp_path, adapter)
    assert_same(streamed(tmp_path), merged_in_memory(tmp_path, None, stored_as))


EXPERTS = {
    "untouched": {"target_modules": ("q_proj", "v_proj")},
    "in full": {"target_modules": ("q_proj",), "train_also": ("layers.1.mlp",)},
}


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("experts", EXPERTS)
def test_experts_that_transformers_fuses_are_written_as_the_files_have_them(tmp_path, kind, experts):
    more = (
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        if kind == "qwen3_moe"
        else {}
    )
    model = tiny.model(kind, **more)
    save_base(tmp_path, model, "bfloat16")
    names = load_file(tmp_path / "base" / "model.safetensors").keys()
    assert any("experts.3." in name for name in names), "one tensor an expert in the files"
    assert not any("experts.3." in name for name, _ in model.named_parameters()), "and fused in the model"
    save_adapter(tmp_path, planned(model.float(), **EXPERTS[experts]))
    found = streamed(tmp_path)
    assert found.keys() == names
    assert_same(found, merged_in_memory(tmp_path, None, "bfloat16"))


@pytest.mark.parametrize("kind", ["gemma3_text", "phi3", "phi", "mamba", "gpt_neox", "granite", "cohere"])
def test_every_architecture_gives_the_same_bits(tmp_path, kind):
    model = tiny.model(kind)
    save_base(tmp_path, model, "bfloat16", max_shard_size=random.choice(["20KB", "1GB"]))
    save_adapter(tmp_path, planned(model.float(), train_also=random.choice([(), ("norms",)])))
    assert_same(streamed(tmp_path), merged_in_memory(tmp_path, None, "bfloat16"))


def test_names_without_the_models_prefix_stay_as_they_are(tmp_path):
    """As in GPT-2's own files; and a tensor that the model has no place for is copied."""
    model = tiny.model("gpt2")
    save_base(tmp_path, model, "float32")
    path = tmp_path / "base" / "model.safetensors"
    short = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    short["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(short, path, metadata={"format": "pt"})
    save_adapter(tmp_path, planned(model))
    output = tmp_path / "merged"
    merge(tmp_path / "adapter", output, None, SCREEN)
    found = load_file(output / "model.safetensors")
    assert found.keys() == short.keys()
    whole = merged_in_memory(tmp_path, None, "float32")
    for name, tensor in short.items():
        assert torch.equal(found[name], whole.get(f"transformer.{name}", tensor))


def test_types_that_are_mixed_in_the_files_stay_so(tmp_path):
    model = tiny.model("llama")
    save_base(tmp_path, model, "bfloat16")
    path = tmp_path / "base" / "model.safetensors"
    W0 = load_file(path)
    W0 = {
        name: W.float() if "norm" in name or "layers.0.self_attn.k_proj" in name else W
        for name, W in W0.items()
    }
    save_file(W0, path, metadata={"format": "pt"})
    save_adapter(tmp_path, planned(model.float(), target_modules=("k_proj", "o_proj")))
    found = streamed(tmp_path)
    assert {name: W.dtype for name, W in found.items()} == {name: W.dtype for name, W in W0.items()}
    assert not torch.equal(found[(name := "model.layers.0.self_attn.k_proj.weight")], W0[name])
    content = (tmp_path / "merged None" / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    placed = sorted(each["data_offsets"][0] for name, each in header.items() if name != "__metadata__")
    kinds = {
        each["data_offsets"][0]: each["dtype"] for name, each in header.items() if name != "__metadata__"
    }
    assert [kinds[start] for start in placed] == sorted(kinds.values(), reverse=True), "the wide ones first"


def test_ends_that_the_files_hold_twice_and_differently_are_two(tmp_path):
    model = tiny.model("llama", tie_word_embeddings=True)
    save_base(tmp_path, model, "float32")
    path = tmp_path / "base" / "model.safetensors"
    W0 = load_file(path)
    W0["lm_head.weight"] = torch.randn_like(W0["model.embed_tokens.weight"])
    save_file(W0, path, metadata={"format": "pt"})
    save_adapter(tmp_path, planned(AutoModelForCausalLM.from_pretrained(tmp_path / "base")))
    found = streamed(tmp_path)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(found[name], W0[name])
    assert json.loads((tmp_path / "merged None" / "config.json").read_text())["tie_word_embeddings"] is False


def test_new_tokens_start_in_the_merged_model_as_they_did_in_training(tmp_path):
    """The rows that the base does not have, some of which belong to no token, are made anew."""
    tokens = ("<|think|>", "<|answer|>")
    model = tiny.model("llama", tie_word_embeddings=random.choice([True, False]))
    save_base(tmp_path, model, "bfloat16")
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<|spare|>"])  # known to the tokenizer, without a row
    tokenizer.save_pretrained(tmp_path / "base")
    recipe = ModelRecipe(name=str(tmp_path / "base"), dtype="bfloat16", add_tokens=tokens)
    language = models.load(recipe)
    made = plan.make(AdapterRecipe(r=4), language.model, language.ends, language.new_rows)
    save_adapter(tmp_path, inject.inject(language.model, made), tokens)
    found = streamed(tmp_path)
    assert_same(found, merged_in_memory(tmp_path, None, "bfloat16"))
    assert found["model.embed_tokens.weight"].shape[0] == 264


@pytest.mark.parametrize("most", [1, 5_000, 60_000, 10**9])
def test_shards_hold_every_tensor_once_and_no_more_than_they_may(tmp_path, monkeypatch, most):
    model = tiny.model("qwen2")
    save_base(tmp_path, model, "bfloat16")
    save_adapter(tmp_path, planned(model.float()))
    monkeypatch.setattr(rewrite, "SHARD", most)
    monkeypatch.setattr(stored, "BLOCK", random.choice([64, 1000, 1 << 24]))
    found = streamed(tmp_path)
    shards = list((tmp_path / "merged None").glob("*.safetensors"))
    sizes = [[t.numel() * t.element_size() for t in load_file(path).values()] for path in shards]
    assert sum(map(len, sizes)) == len(found)
    assert all(sum(each) <= most or len(each) == 1 for each in sizes)
    assert_same(found, merged_in_memory(tmp_path, None, "bfloat16"))


# What goes wrong


def small(folder: Path) -> None:
    model = tiny.model("llama", num_hidden_layers=1)
    save_base(folder, model, "bfloat16")
    save_adapter(folder, planned(model.float(), target_modules=("q_proj",)))


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A merge of which every operation on a file is known, and the files that it ends with."""
    small(tmp_path)
    monkeypatch.setattr(rewrite, "SHARD", 20_000)
    root = tmp_path / "root"
    root.mkdir()
    disk = Disk(root)
    with disk.watched():
        merge(tmp_path / "adapter", root / "merged", None, SCREEN)
    assert sum(operation.kind == "write" for operation in disk.log) > 20
    return disk.log, contents(root / "merged")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("crash", ["killed", "without power"])
def test_a_merge_that_ends_at_any_operation_on_a_file_leaves_no_half_of_a_model(tmp_path, recorded, crash):
    log, whole = recorded
    left, tree, seen = tmp_path / "left", Tree(tmp_path / "root"), set()
    for operation in [None, *log]:
        if operation is not None:
            tree.do(operation)
        tree.write(left) if crash == "killed" else tree.write_crashed(left, random.Random(random.random()))
        names = {path.name for path in left.iterdir()}
        assert all(io_ops.LEFTOVER.fullmatch(name) for name in names - {"merged"})
        assert "merged" not in names or contents(left / "merged") == whole
        seen.add("merged" in names)
        shutil.rmtree(left)
    assert seen == {True, False}


@pytest.mark.parametrize("fault", [failing, full_disk])
def test_a_merge_that_is_refused_at_any_operation_on_a_file_leaves_nothing(tmp_path, recorded, fault):
    log, _ = recorded
    root = tmp_path / "root"
    shutil.rmtree(root / "merged")
    renames = [number for number, each in enumerate(log) if each.kind == "rename"]
    for number in random.sample(range(renames[-1]), 16):
        with pytest.raises(UserError) as caught, Disk(root, before=fault(number)).watched():
            merge(tmp_path / "adapter", root / "merged", None, SCREEN)
        assert caught.value.code == ExitCode.DISK
        assert list(root.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "shape", "missing"])
def test_a_damaged_base_is_named_and_nothing_is_written(tmp_path, damage):
    small(tmp_path)
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.self_attn.q_proj.weight"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        tensors[name] = tensors[name][:-1].clone()
        if damage == "missing":
            del tensors[name]
        save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=str(tmp_path / "base")) as caught:
        merge(tmp_path / "adapter", tmp_path / "merged", None, SCREEN)
    assert caught.value.code == ExitCode.MODEL
    assert damage == "cut" or name in str(caught.value)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["adapter", "base"]
