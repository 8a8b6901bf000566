"""`train.compile`: the same numbers, compiled once, whatever the lengths of the rows."""

import json
import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo import config as dynamo
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from lora_cli import attention
from lora_cli.adapter.inject import tensors_of
from lora_cli.blocks import blocks
from lora_cli.data.pack import micro_batches
from lora_cli.errors import UserError
from lora_cli.recipe.schema import Recipe
from lora_cli.run import prepare
from lora_cli.run.train import train
from lora_cli.screen import Screen
from lora_cli.train import checkpoint, compiled
from lora_cli.train.compiled import as_written, compile_blocks
from lora_cli.train.loop import train_steps
from lora_cli.train.loss import loss_sum
from tests import training as in_memory
from tests.training import Rows, training

CPU = torch.device("cpu")
ONE: dict[str, Any] = {"num_hidden_layers": 1}
pytestmark = pytest.mark.filterwarnings("ignore")
"""PyTorch's compiler makes some of its own."""


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    """Nothing that another test has compiled, and no report of every step of the compiler in pytest's log.

    As in `lora train`, what is compiled keeps what it wants.
    """
    monkeypatch.setattr(in_memory, "keep_less", lambda model: None)
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    torch._dynamo.reset()
    counters.clear()
    ours = dynamo.patch(specialize_float=False, recompile_limit=8)
    with ours, inductor.patch(fallback_random=False):
        yield
    torch._dynamo.reset()


def trained(backend, adapter, train=None, precision=torch.float32, **how):
    """Losses and tensors after some steps."""
    run = training({"r": 3, **adapter}, {"max_steps": 2, **(train or {})}, **how)
    run.precision = precision
    if backend is not None:
        compile_blocks(run.model, backend)
    losses = [report.loss for report in train_steps(run)]
    return losses, {name: tensor.clone() for name, tensor in tensors_of(run.adapter).items()}


@pytest.mark.parametrize(
    ("kind", "adapter", "train", "config"),
    [
        ("llama", {"dropout": 0.2}, {"gradient_checkpointing": True}, ONE),
        ("qwen3", {"method": "dora", "dropout": 0.2}, {}, ONE),
        ("gpt2", {"method": "pissa", "lora_bias": True}, {}, {"n_layer": 1}),
        ("gemma2", {}, {}, {}),
    ],
)
def test_a_compiled_model_learns_the_same_and_no_layer_breaks_a_graph(kind, adapter, train, config):
    rows = Rows()
    plain, made = (
        trained(each, adapter, train, kind=kind, rows=rows, **config) for each in (None, "aot_eager")
    )
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    assert made[0] == pytest.approx(plain[0], rel=1e-6)
    assert made[1].keys() == plain[1].keys()
    for name, tensor in plain[1].items():
        torch.testing.assert_close(made[1][name], tensor, rtol=1e-4, atol=1e-6)


def test_a_model_computed_in_bfloat16_is_compiled_without_a_break():
    rows = Rows()
    plain, made = (
        trained(each, {}, precision=torch.bfloat16, rows=rows, **ONE) for each in (None, "aot_eager")
    )
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    assert made[0] == pytest.approx(plain[0], rel=1e-3)
    assert made[0] != pytest.approx(trained(None, {}, rows=rows, **ONE)[0], rel=1e-7)


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile with")
def test_what_inductor_makes_learns_the_same_and_drops_the_same():
    rows = Rows()
    plain, made = (
        trained(each, {"dropout": 0.3}, {"learning_rate": 1e-2}, rows=rows, **ONE)
        for each in (None, "inductor")
    )
    assert counters["inductor"]
    assert made[0] == pytest.approx(plain[0], rel=1e-6)
    for name, tensor in plain[1].items():
        torch.testing.assert_close(made[1][name], tensor, rtol=1e-3, atol=1e-5)


def test_a_compiled_run_goes_on_from_a_checkpoint_to_the_bit(tmp_path):
    rows, found = Rows(), []
    for stop in (None, 2):
        run = begun(rows)
        for report in train_steps(run):
            if report.step == stop:
                checkpoint.save(tmp_path, run, {})
                break
        if stop is not None:
            run = begun(rows)
            checkpoint.restore(tmp_path / "step-000002", run)
            assert [report.step for report in train_steps(run)] == [3, 4]
        found.append({name: tensor.clone() for name, tensor in tensors_of(run.adapter).items()})
    assert all(torch.equal(found[1][name], tensor) for name, tensor in found[0].items())


def begun(rows):
    run = training({"dropout": 0.2}, {"max_steps": 4}, rows=rows, **ONE)
    compile_blocks(run.model, "aot_eager")
    return run


@pytest.mark.parametrize("again", [False, True])
def test_other_lengths_compile_nothing_anew_and_attention_breaks_a_block_once(again):
    rows, counter = Rows(60), CompileCounter()
    run = training({}, {"gradient_checkpointing": again}, rows=rows)
    attention.use(run.model)
    compile_blocks(run.model, counter)
    made = []
    for count in range(2, 9):
        some = range(count, 3 * count)
        (batch,) = micro_batches(rows, some, max_tokens=None, max_rows=None, packing=True, pad_id=0)
        loss_sum(run.model, batch, CPU).backward()
        made.append(counter.frame_count)
    # Per block two norms, the MLP, and attention in two halves; those of the second block, whose input has a gradient,
    # serve all further ones, and with recomputation the first one, too.
    # Once more where the first row is as long as something else in the model is wide.
    assert len({*made}) <= 2
    assert 0 < made[0] <= 10
    assert sum(counters["graph_break"].values()) <= 2 * len(blocks(run.model))


def test_more_blocks_compile_nothing_anew():
    found = []
    for layers in (2, 3):
        torch._dynamo.reset()
        counter = CompileCounter()
        run = training({}, num_hidden_layers=layers)
        compile_blocks(run.model, counter)
        next(train_steps(run))
        found.append(counter.frame_count)
    assert found[0] == found[1] > 0


def test_layers_of_many_ranks_are_compiled_each():
    layers, counter = 10, CompileCounter()
    ranks = {f"layers.{number}.mlp.down_proj": number + 1 for number in range(layers)}
    adapter = {"target_modules": ("down_proj",), "rank_pattern": ranks}
    run = training(adapter, num_hidden_layers=layers)
    compile_blocks(run.model, counter)
    run.model(torch.tensor([[5, 6, 7]]))
    assert counter.frame_count > layers  # by itself PyTorch gives up after the eighth


def test_no_parameter_has_another_name_and_evaluation_compiles_nothing():
    counter = CompileCounter()
    run = training({}, **ONE)
    names = [name for name, _ in run.model.named_parameters()]
    compile_blocks(run.model, counter)
    assert [name for name, _ in run.model.named_parameters()] == names
    with as_written(True):
        run.model(torch.tensor([[5, 6, 7]]))
    assert counter.frame_count == 0
    run.model(torch.tensor([[5, 6, 7]]))
    assert counter.frame_count > 0


# A whole run


@pytest.fixture
def recipe(tiny_folder, rows_file, tmp_path):
    """Make a recipe of two packed steps, with evaluation and samples after the second."""

    def make(output, compile):
        return Recipe.model_validate(
            {
                "model": {"name": str(tiny_folder), "dtype": "float32"},
                "data": {
                    "train": str(rows_file),
                    "eval_fraction": 0.2,
                    "format": {"prompt": "{question}", "completion": "{answer}"},
                },
                "adapter": {"r": 3, "target_modules": ("down_proj", "q_proj")},
                "train": {"max_steps": 2, "batch_size": 6, "learning_rate": 1e-2, "compile": compile},
                "eval": {"samples": 1, "max_new_tokens": 3},
                "output": {"dir": str(tmp_path / output)},
            }
        )

    return make


def test_a_run_is_compiled_where_the_recipe_says_so_and_measured_as_written(recipe, monkeypatch):
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(compiled, "compile_blocks", partial(compile_blocks, backend=counter))
    monkeypatch.setattr(compiled, "_require", lambda gpu: None)
    found = []
    for compile in (False, True):
        asked = recipe(f"run-{compile}", compile)
        folder = train(asked, Screen.silent())
        assert (counter.frame_count > 0) == compile
        lines = [json.loads(line) for line in (folder.parent / "log.jsonl").read_text().splitlines()]
        losses = [line[key] for line in lines for key in ("loss", "eval_loss") if key in line]
        found.append((losses, load_file(folder / "adapter_model.safetensors")))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for name, tensor in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], tensor, rtol=1e-4, atol=1e-6)


def test_what_the_compiler_cannot_do_is_told_in_one_line(recipe, monkeypatch):
    def fails(*_):
        raise OSError("no room for what is compiled\nand much more")

    monkeypatch.setattr(compiled, "compile_blocks", partial(compile_blocks, backend=fails))
    monkeypatch.setattr(compiled, "_require", lambda gpu: None)
    with pytest.raises(UserError, match="no room") as told:
        train(recipe("run", True), Screen.silent())
    assert "train.compile" in str(told.value)
    assert "much more" not in str(told.value)


# Refused


def recipe_of(adapter, train=None, model=None):
    return Recipe.model_validate(
        {
            "model": {"name": "some/model", **(model or {})},
            "data": {"train": "x.jsonl"},
            "adapter": adapter,
            "train": {"compile": True, **(train or {})},
        }
    )


@pytest.mark.parametrize(
    ("adapter", "train", "model", "told"),
    [
        ({"method": "adalora"}, {}, {}, "delta: gated"),
        ({"method": "relora"}, {}, {}, "lifecycle: restart"),
        ({"method": "longlora"}, {}, {}, "attention: shifted"),
        ({"method": "molora"}, {}, {}, "delta: "),
        ({"combine": "optimizer_view"}, {}, {}, "combine: optimizer_view"),
        ({}, {"parallel": "fsdp"}, {}, "fsdp"),
        ({}, {}, {"quantize": "int8"}, "quantize: int8"),
        ({}, {}, {"split_experts": True}, "split_experts"),
    ],
)
def test_what_is_not_compiled_is_refused_before_anything_is_loaded(adapter, train, model, told):
    with pytest.raises(UserError, match=told) as refused:
        prepare.check_method(recipe_of(adapter, train, model))
    assert "train.compile" in str(refused.value)


def test_lora_dora_and_their_kin_may_be_compiled(monkeypatch):
    monkeypatch.setattr(compiled, "_require", lambda gpu: None)
    for method in ("lora", "dora", "pissa", "rslora", "lora_plus", "lora_fa"):
        prepare.check_method(recipe_of({"method": method}))


def test_without_a_compiler_the_reason_is_given_before_anything_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="no-such-compiler"):
        prepare.check_method(recipe_of({}))
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"no C\+\+ compiler"):
        prepare.check_method(recipe_of({}))


def test_a_gpu_without_triton_is_no_place_to_compile_for(monkeypatch, tmp_path):
    compiler: Path = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    compiled._require(gpu=False)
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="Triton"):
        compiled._require(gpu=True)
