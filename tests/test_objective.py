"""A run optimises what it says: the same step however it is computed, and never a silent success without learning.

Each heading is one guarantee. What is disturbed is disturbed from outside; the tool itself has to notice.
"""

import copy
import itertools
import json
import math
import random
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.utils import checkpoint as recompute
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lora_cli import attention, cli
from lora_cli.adapter import files
from lora_cli.data import cache
from lora_cli.data import format as formats
from lora_cli.data.example import IGNORE, Example
from lora_cli.data.pack import micro_batches
from lora_cli.data.row import Row
from lora_cli.errors import ExitCode, UserError
from lora_cli.evaluate import loss as losses
from lora_cli.recipe.load import load
from lora_cli.recipe.schema import DataRecipe, Recipe
from lora_cli.run import prepare
from lora_cli.run.check import check
from lora_cli.run.evaluate import evaluate
from lora_cli.run.folder import RunFolder
from lora_cli.run.merge import merge
from lora_cli.run.open import open_model
from lora_cli.run.train import train
from lora_cli.screen import Screen
from lora_cli.train import checkpoint, loop
from lora_cli.train.gradient import accumulate
from lora_cli.train.loss import Loss
from tests import tiny
from tests.bench import SMALL, Bench, contents, often, result, root_of
from tests.forking import forker
from tests.training import Rows, distance, fresh, training

SPLITS = (8, 4, 2, 1)
"""Rows of a micro-batch; the step has eight."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[loop.Training]:
    """Every training that is begun in the test, in order."""
    runs: list[loop.Training] = []
    real = loop.Training.__post_init__

    def kept(run: loop.Training) -> None:
        real(run)
        runs.append(run)

    monkeypatch.setattr(loop.Training, "__post_init__", kept)
    return runs


def refused(recipe: Recipe, code: ExitCode) -> UserError:
    """The error of a run that leaves no adapter."""
    with pytest.raises(UserError) as caught:
        train(recipe, Screen())
    assert caught.value.code is code, caught.value
    assert not (root_of(recipe) / "adapter").exists()
    return caught.value


def randomised(run: loop.Training) -> loop.Training:
    """With every tensor of the adapter random, so that each has a gradient."""
    generator = fresh()
    with torch.no_grad():
        for parameter in run.adapter.named_tensors().values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return run


def joined(tensors: Iterator[Tensor] | list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten().double() for tensor in tensors])


# G9: how a step is computed does not change what it computes


token = st.integers(5, tiny.VOCABULARY - 1)
document = st.lists(st.tuples(token, st.booleans()), min_size=1, max_size=20)
step_of_eight = st.lists(document, min_size=8, max_size=8).filter(
    lambda found: any(trained for each in found for _, trained in each[1:])
)


class Drawn(Rows):
    """The rows of a step, some of them perhaps without a trained token."""

    def __init__(self, documents: list[list[tuple[int, bool]]]) -> None:
        super().__init__(0)
        for number, pairs in enumerate(documents):
            ids, trained = zip(*pairs, strict=True)
            self.append(Example(ids, (False, *trained[1:]), f"memory:{number}"))
        self.lengths = np.array([len(example.input_ids) for example in self])
        self.trained_counts = np.array([sum(example.trained) for example in self])


def gradient(run: loop.Training, micro_batch: int, packing: bool) -> Tensor:
    """Of the eight rows, as the loop computes it."""
    run.max_rows, run.packing = micro_batch, packing
    run.optimizer.zero_grad(set_to_none=True)
    rows = list(range(8))
    accumulate(run, rows, int(run.examples.trained_counts[rows].sum()))
    return joined([p.grad for p in run.adapter.trainable().values()])


def defined(run: loop.Training) -> Tensor:
    """−∂/∂θ mean log p over the trained tokens, one row at a time by the model alone."""
    run.optimizer.zero_grad(set_to_none=True)
    for example in run.examples:
        ids = torch.tensor([example.input_ids])
        log_p = run.model(ids, use_cache=False).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])
        trained = torch.tensor(example.trained[1:], dtype=log_p.dtype)
        (-(log_p[:, 0] * trained).sum() / run.examples.trained_counts.sum()).backward()
    return joined([p.grad for p in run.adapter.trainable().values()])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_gradient_of_a_step_is_the_same_however_it_is_split_and_packed(kind):
    narrow = randomised(training({}, {"batch_size": 8, "micro_batch_size": 8}, kind=kind))
    attention.use(narrow.model)
    wide = copy.deepcopy(narrow)
    wide.model.double()
    wide.precision = torch.float64

    # Nothing is made smaller: the rows of a failing step are few and short as they are.
    @settings(max_examples=4, deadline=None, phases=[Phase.generate])
    @given(step_of_eight)
    def holds(documents):
        narrow.examples = wide.examples = Drawn(documents)
        exact, rounded = defined(wide), defined(narrow)
        for micro_batch, packing in itertools.product(SPLITS, (False, True)):
            assert distance(gradient(wide, micro_batch, packing), exact) <= 1e-10, (micro_batch, packing)
            found = gradient(narrow, micro_batch, packing)
            assert distance(found, exact) <= 1e-6 + 10 * distance(rounded, exact), (micro_batch, packing)

    holds()


@pytest.mark.parametrize("way", ["eager", "sdpa", "cut"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_packed_document_is_what_it_is_alone_whatever_stands_beside_it(kind, way):
    """With an adapter, in each way to attend; another document in front changes no bit."""
    attending = {"attn_implementation": "sdpa" if way == "cut" else way}
    run = randomised(training({}, kind=kind, **attending))
    if way == "cut":
        attention.use(run.model)
    model = run.model.eval()
    lengths = sorted(random.choices(range(2, 30), k=4), reverse=True)
    drawn = [torch.randint(5, tiny.VOCABULARY, (length,), generator=fresh()).tolist() for length in lengths]
    other = [[token_ % 250 + 6 for token_ in drawn[0]], *drawn[1:]]

    def log_p(*documents: list[int]) -> Tensor:
        rows = [Example(tuple(ids), (True,) * len(ids), "") for ids in documents]
        limits: dict[str, Any] = {"max_tokens": None, "max_rows": None}
        (pack,) = micro_batches(rows, range(len(rows)), **limits, packing=True, pad_id=0)
        with torch.no_grad():
            found = model(input_ids=pack.input_ids, position_ids=pack.position_ids, use_cache=False)
        return found.logits[0].log_softmax(-1)

    together = log_p(*drawn)
    assert torch.equal(log_p(*other)[lengths[0] :], together[lengths[0] :])
    alone = torch.cat([log_p(ids) for ids in drawn])
    assert (together - alone).abs().max() <= 1e-5


# G11: a run that learned nothing, or saved something else, is an error


LEARNING = {
    "llama": ("llama", {}),
    "gpt2": ("gpt2", {"lora_bias": True}),
    "head": ("llama", {"target_modules": ("q_proj", "lm_head")}),
    "beside": ("llama", {"train_also": ("norms",)}),
    "dora": ("llama", {"method": "dora"}),
}


@pytest.mark.parametrize(("kind", "adapter"), LEARNING.values(), ids=LEARNING)
def test_the_first_step_moves_every_b_and_the_optimizer_holds_what_trains(kind, adapter):
    run = training(adapter, kind=kind)
    before = {name: p.detach().clone() for name, p in run.adapter.named_tensors().items()}
    next(loop.train_steps(run))
    moved = {name for name, p in run.adapter.named_tensors().items() if not torch.equal(p, before[name])}
    assert {f"{name}.B" for name in run.adapter.layers} <= moved
    held = [id(p) for group in run.optimizer.param_groups for p in group["params"]]
    assert len(set(held)) == len(held)
    assert set(held) == {id(p) for p in run.adapter.trainable().values()}
    everything = {id(p) for p in run.model.parameters() if p.requires_grad}
    assert everything == set(held), "nothing else of the model trains"


@pytest.mark.parametrize(
    "adapter",
    [
        {},
        {
            "scale": "rslora",
            "r": 3,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"layers.0.*v_proj": 3.0},
        },
        {"method": "dora"},
        {"train_also": ("norms", "head"), "layers": (0,)},
    ],
)
def test_the_adapter_on_disk_computes_the_live_models_logits_to_the_bit(bench, started, adapter):
    asked = bench.recipe(adapter=adapter)
    folder = train(asked, Screen())
    live, read = started[0].model.eval(), open_model([folder]).language.model.eval()
    ids = torch.randint(5, tiny.VOCABULARY, (2, 17), generator=fresh())
    with torch.no_grad():
        assert torch.equal(read(ids).logits, live(ids).logits)


def freeze_one(run: loop.Training) -> None:
    """As somebody would who trains a part of the adapter only, too late."""
    random.choice(list(run.adapter.trainable().values())).requires_grad_(False)


def drop_one(run: loop.Training) -> None:
    """Take a tensor out of the optimizer."""
    random.choice(run.optimizer.param_groups)["params"].pop()


@pytest.mark.parametrize("mutate", [freeze_one, drop_one])
@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_tensor_that_stays_as_it_is_is_noticed_whenever_it_is_lost(bench, monkeypatch, mutate, after):
    """Between optimizer and loop, after the first step, before the last one."""
    real_init, real_update = loop.Training.__post_init__, loop._update

    def initialised(run: loop.Training) -> None:
        if after == 0:
            mutate(run)
        real_init(run)

    def updated(run: loop.Training, grad_norm: float) -> None:
        real_update(run, grad_norm)
        if run.step + 1 == after:
            mutate(run)

    monkeypatch.setattr(loop.Training, "__post_init__", initialised)
    monkeypatch.setattr(loop, "_update", updated)
    asked = bench.recipe()
    with pytest.raises(AssertionError, match="in the optimizer"):
        train(asked, Screen())
    assert not (root_of(asked) / "adapter").exists()


def test_checkpointing_that_detaches_what_goes_into_a_block_is_noticed(bench, monkeypatch):
    asked = bench.recipe(train={"gradient_checkpointing": True})
    reentrant = partial(recompute.checkpoint, use_reentrant=True)
    monkeypatch.setattr(
        prepare,
        "recompute",
        lambda model, _: model._set_gradient_checkpointing(gradient_checkpointing_func=reentrant),
    )
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        assert "nothing received a gradient" in refused(asked, ExitCode.LEARNED_NOTHING).what


def test_one_block_that_is_detached_is_noticed_in_a_short_run_too(bench, tiny_folder, monkeypatch):
    asked = bench.recipe(
        model={"name": str(tiny_folder)}, adapter={"dropout": 0.0}, train={"epochs": None, "max_steps": 2}
    )
    real = prepare.inject

    def detached(model: Any, *arguments: Any, **settings: Any) -> Any:
        made = real(model, *arguments, **settings)
        model.model.layers[1].register_forward_pre_hook(lambda _, inputs: (inputs[0].detach(), *inputs[1:]))
        return made

    monkeypatch.setattr(prepare, "inject", detached)
    assert "layers.0" in refused(asked, ExitCode.LEARNED_NOTHING).what


CHANGES: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "nothing": lambda _: {},
    "one missing": lambda tensors: dict(list(tensors.items())[1:]),
    "one more": lambda tensors: tensors | {"base_model.model.lm_head.lora_C": torch.ones(1)},
    "one renamed": lambda tensors: {key.replace("q_proj", "k_proj"): t for key, t in tensors.items()},
    "other values": lambda tensors: {key: 2 * t for key, t in tensors.items()},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_save_that_writes_something_else_is_noticed(bench, monkeypatch, change):
    real = files.to_bytes
    monkeypatch.setattr(files, "to_bytes", lambda tensors, **more: real(change(tensors), **more))
    with pytest.raises(UserError) as caught:
        train(asked := bench.recipe(), Screen())
    assert caught.value.code in (ExitCode.VERIFICATION, ExitCode.MODEL)
    assert not (root_of(asked) / "adapter").exists()


@pytest.mark.parametrize(
    "values", [{"lora_alpha": 7}, {"use_rslora": True}, {"target_modules": ["k_proj", "q_proj"]}]
)
def test_a_save_whose_config_computes_something_else_is_noticed(bench, monkeypatch, values):
    real = files.peft_format.config_of
    monkeypatch.setattr(files.peft_format, "config_of", lambda *arguments: real(*arguments) | values)
    with pytest.raises(UserError) as caught:
        train(asked := bench.recipe(adapter={"target_modules": ("q_proj",)}), Screen())
    assert caught.value.code in (ExitCode.VERIFICATION, ExitCode.MODEL)
    assert not (root_of(asked) / "adapter").exists()


PATTERNS = {
    "target_modules": (("q_proj", "v_prj"), "v_prj", "v_proj"),
    "exclude_modules": (("dwn_proj",), "dwn_proj", "down_proj"),
    "rank_pattern": ({"q_proj": 2, "k_porj": 2}, "k_porj", "k_proj"),
    "alpha_pattern": ({"gate_prj": 2.0}, "gate_prj", "gate_proj"),
    "train_also": (("lm_haed",), "lm_haed", "lm_head"),
}


@pytest.mark.parametrize("key", PATTERNS)
def test_a_pattern_that_matches_nothing_is_an_error_with_the_nearest_names(bench, key):
    value, wrong, nearest = PATTERNS[key]
    error = refused(bench.recipe(adapter={key: value}), ExitCode.LEARNED_NOTHING)
    assert wrong in error.what
    assert nearest in error.fix
    assert error.where == f"adapter.{key}"


# G12: what is not finite reaches neither weights nor checkpoints


def in_the_loss(run: loop.Training, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Loss.__call__
    monkeypatch.setattr(Loss, "__call__", lambda own, batch, device: real(own, batch, device) + value)


def in_one_gradient(run: loop.Training, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    delta = random.choice([layer.delta for layer in run.adapter.layers.values()])
    parameter = random.choice([p for p in delta.parameters() if p.requires_grad])

    def poisoned(gradient: Tensor) -> Tensor:
        found = gradient.clone()
        found.view(-1)[random.randrange(found.numel())] = value
        return found

    parameter.register_hook(poisoned)


def in_the_base(run: loop.Training, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        base = random.choice(list(run.adapter.layers.values())).base_layer.weight
        base.view(-1)[random.randrange(base.numel())] = value


def in_evaluation(run: loop.Training, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    real = losses._sums

    def poisoned(*arguments: Any) -> Tensor:
        found = real(*arguments)
        found[random.randrange(len(found))] = value
        return found

    monkeypatch.setattr(losses, "_sums", poisoned)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("inject", [in_the_loss, in_one_gradient, in_the_base, in_evaluation])
def test_what_is_not_finite_ends_the_run_with_the_weights_of_the_step_before(
    bench, started, monkeypatch, capsys, inject, value
):
    asked = bench.recipe(train={"save_steps": 1, "eval_steps": 1, "keep_checkpoints": 9})
    last, real = random.randrange(1, 6), loop._step

    def step(run: loop.Training, rows: list[int]) -> loop.StepReport:
        if run.step == last:
            inject(run, value, monkeypatch)
        return real(run, rows)

    monkeypatch.setattr(loop, "_step", step)
    monkeypatch.setattr(sys, "argv", ["lora", "train", str(bench.file(asked))])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == ExitCode.NON_FINITE
    said = capsys.readouterr().err.replace("\n", "")
    assert "not a finite number" in said
    assert "rows.jsonl:" in said
    assert not (root_of(asked) / "adapter").exists()
    kept = [path.name for path in checkpoint._all(root_of(asked) / "checkpoints")]
    assert kept == [f"step-{step:06d}" for step in range(1, last + 1)], (
        "the step that was not taken is not saved"
    )
    saved = load_file(root_of(asked) / "checkpoints" / kept[-1] / checkpoint.ADAPTER)
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())
    if inject is not in_evaluation:  # that comes after the step, which was good
        now = started[0].adapter.named_tensors()
        assert all(torch.equal(saved[name], tensor) for name, tensor in now.items())
    log = (root_of(asked) / "log.jsonl").read_text()
    assert "NaN" not in log
    assert "Infinity" not in log


@pytest.mark.parametrize("patience", [None, 2])
def test_no_evaluation_that_is_not_finite_is_ever_the_best(bench, monkeypatch, patience):
    settings_ = {"eval_steps": 1, "epochs": 3, "early_stopping_patience": patience}
    asked = bench.recipe(train=settings_)
    in_evaluation(None, math.nan, monkeypatch)
    assert "held-out" in refused(asked, ExitCode.NON_FINITE).what


def test_an_update_that_makes_weights_infinite_is_never_saved(bench):
    for more in ({"save_steps": 1}, {"epochs": None, "max_steps": 1}):
        asked = bench.recipe(train={"learning_rate": 1e39, **more}, data={"eval_fraction": 0})
        assert "not finite" in refused(asked, ExitCode.NON_FINITE).what
        assert not checkpoint._all(root_of(asked) / "checkpoints")


# G13: short of memory, the same step is computed in smaller pieces


class ShortOfMemory(torch.autograd.Function):
    """The identity, whose backward pass finds no memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise torch.OutOfMemoryError


def short_of_memory(monkeypatch: pytest.MonkeyPatch, step: int, most: int, where: str) -> None:
    """From a step on, no more than `most` rows at once; the first that is larger still fits, the next does not."""
    real, real_step, now, larger = Loss.__call__, loop._step, [0], itertools.count()

    def watched(run: loop.Training, rows: list[int]) -> loop.StepReport:
        now[0] = run.step
        return real_step(run, rows)

    def tight(own: Loss, batch: Any, device: torch.device) -> Tensor:
        if now[0] < step or len(batch.rows) <= most or next(larger) % 2 == 0:
            return real(own, batch, device)
        if where == "forward":
            raise torch.OutOfMemoryError
        return ShortOfMemory.apply(real(own, batch, device))

    monkeypatch.setattr(loop, "_step", watched)
    monkeypatch.setattr(Loss, "__call__", tight)


def smaller_from(monkeypatch: pytest.MonkeyPatch, step: int, most: int) -> None:
    """The run that is told to compute so many rows at once from a step on."""
    real = loop._step

    def told(run: loop.Training, rows: list[int]) -> loop.StepReport:
        if run.step == step:
            run.max_rows = most
        return real(run, rows)

    monkeypatch.setattr(loop, "_step", told)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("at_first", [True, False])
def test_out_of_memory_gives_the_run_with_the_smaller_micro_batch(bench, monkeypatch, where, at_first):
    """To the bit the one that computes less at once from the same step on, and to rounding the one that always did."""
    step, most = 0 if at_first else random.randrange(1, 6), random.choice([1, 2])
    train_settings = {
        "batch_size": 9,
        "epochs": None,
        "max_steps": 6,
        "optimizer": "sgd",
        "learning_rate": 0.1,
    }

    def tensors(rows: int) -> dict[str, Tensor]:
        asked = bench.recipe(adapter={"dropout": 0.0}, train={**train_settings, "micro_batch_size": rows})
        return load_file(train(asked, Screen()) / files.WEIGHTS)

    stated = tensors(most)
    with monkeypatch.context() as patched:
        smaller_from(patched, step, most)
        told = tensors(4)
    short_of_memory(monkeypatch, step, most, where)
    found = tensors(4)
    assert all(torch.equal(found[name], told[name]) for name in told)
    assert distance(joined(list(found.values())), joined(list(stated.values()))) <= 1e-6
    if at_first:
        assert all(torch.equal(found[name], stated[name]) for name in stated)


def test_evaluation_takes_no_more_at_once_than_training_had_memory_for(bench, monkeypatch):
    real_loss, real_sums, cells = Loss.__call__, losses._sums, 60

    def within(batch: Any) -> None:
        if batch.input_ids.numel() > cells:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(
        Loss, "__call__", lambda own, batch, at: (within(batch), real_loss(own, batch, at))[1]
    )
    monkeypatch.setattr(losses, "_sums", lambda m, batch, at: (within(batch), real_sums(m, batch, at))[1])
    train(asked := bench.recipe(train={"micro_batch_size": "auto"}), Screen())
    assert any("eval_loss" in line for line in RunFolder(root_of(asked)).lines())


# G14: what is learned is the answer and its end, behind one BOS


class Chat(NamedTuple):
    """How a family of models writes a chat; `{}` stands for the answer."""

    template: str
    written: str
    """What generation writes for an answer, with the end of the turn."""
    special: tuple[str, ...]
    turns: bool = True
    """Whether BOS stands once in a conversation of several turns, too."""


def each(user: str, assistant: str, generate: str, start: str = "") -> str:
    """A template that writes every turn by its role."""
    return (
        f"{start}{{% for m in messages %}}{{% if m['role'] == 'user' %}}{user}{{% else %}}{assistant}{{% endif %}}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{generate}{{% endif %}}"
    )


def marked(
    open_: str, close: str, start: str = "{{ bos_token }}", role: str = "assistant", gap: str = "\n"
) -> str:
    """A template with a header before and an end after each turn."""
    turn = f"{open_.replace('ROLE', '{{ name }}')}{{{{ m['content'] | trim }}}}{close}"
    return (
        f"{start}{{% for m in messages %}}{{% set name = '{role}' if m['role'] == 'assistant' else m['role'] %}}"
        f"{turn}{gap}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{open_.replace('ROLE', role)}{{% endif %}}"
    )


C = "{{ m['content'] }}"
CHATS = {
    "chatml": Chat(
        marked("<|im_start|>ROLE\n", "<|im_end|>", ""), "{}<|im_end|>", ("<|im_start|>", "<|im_end|>")
    ),
    "llama2": Chat(
        each(f"{{{{ bos_token }}}}[INST] {C} [/INST]", f" {C} {{{{ eos_token }}}}", ""), " {} EOS", (), False
    ),
    "llama3": Chat(
        marked("<|start_header_id|>ROLE<|end_header_id|>\n\n", "<|eot_id|>", gap=""),
        "{}<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "mistral": Chat(
        each(f"[INST] {C}[/INST]", f" {C}{{{{ eos_token }}}}", "", "{{ bos_token }}"), " {}EOS", ()
    ),
    "gemma": Chat(
        marked("<start_of_turn>ROLE\n", "<end_of_turn>", role="model"),
        "{}<end_of_turn>",
        ("<start_of_turn>", "<end_of_turn>"),
    ),
    "phi": Chat(marked("<|ROLE|>\n", "<|end|>", ""), "{}<|end|>", ("<|user|>", "<|assistant|>", "<|end|>")),
    "zephyr": Chat(marked("<|ROLE|>\n", "{{ eos_token }}", ""), "{}EOS", ()),
    "vicuna": Chat(
        each(f"USER: {C} ", f"ASSISTANT: {C}{{{{ eos_token }}}}", "ASSISTANT:", "{{ bos_token }}"),
        " {}EOS",
        (),
    ),
    "alpaca": Chat(
        each(f"### Instruction:\n{C}\n\n", f"### Response:\n{C}{{{{ eos_token }}}}\n\n", "### Response:\n"),
        "{}EOS",
        (),
    ),
    "deepseek": Chat(
        each(f"User: {C}\n\n", f"Assistant: {C}{{{{ eos_token }}}}", "Assistant:", "{{ bos_token }}"),
        " {}EOS",
        (),
    ),
    "qwen": Chat(
        "<|im_start|>system\nBe kind.<|im_end|>\n" + marked("<|im_start|>ROLE\n", "<|im_end|>", ""),
        "{}<|im_end|>",
        ("<|im_start|>", "<|im_end|>"),
    ),
    "command-r": Chat(
        each(
            f"<|START|><|USER|>{C}<|END|>",
            f"<|START|><|BOT|>{C}<|END|>",
            "<|START|><|BOT|>",
            "{{ bos_token }}",
        ),
        "{}<|END|>",
        ("<|START|>", "<|USER|>", "<|BOT|>", "<|END|>"),
    ),
}
said = st.text(st.sampled_from("abcXYZ09äß字.,!? "), min_size=1, max_size=12).map(str.strip).filter(bool)


def speaker(chat: Chat) -> Any:
    """A tokenizer whose pad token is its end token, and which puts BOS in front by habit."""
    tokenizer = tiny.tokenizer(chat.template)
    tokenizer.add_tokens(list(chat.special), special_tokens=True)
    tokenizer.pad_token = tokenizer.eos_token = "<eos>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A", None, [("<bos>", 1)])
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer


@pytest.mark.parametrize("name", CHATS)
@settings(max_examples=6, deadline=None)
@given(st.lists(st.tuples(said, said), min_size=1, max_size=3))
def test_what_a_batch_teaches_is_each_answer_and_its_end_behind_one_bos(name, turns):
    chat, tokenizer = CHATS[name], speaker(CHATS[name])
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    recipe = DataRecipe.model_validate({"train": "a", "format": "messages"})
    form = formats.make(recipe, tokenizer, ["messages"])
    examples = form.examples(Row({"messages": messages}, "rows.jsonl:1"))
    longer = Example((7,) * 400, (False, *[True] * 399), "rows.jsonl:2")  # so that the others are padded
    for packing in (False, True):
        batches = micro_batches(
            [*examples, longer],
            range(len(examples) + 1),
            max_tokens=None,
            max_rows=None,
            packing=packing,
            pad_id=tokenizer.pad_token_id,
        )
        taught = [
            token
            for batch in batches
            for token in batch.labels.flatten().tolist()
            if token not in (IGNORE, 7)
        ]
        right = "".join(chat.written.format(answer) for _, answer in turns)
        assert tokenizer.decode(taught) == right.replace("EOS", tokenizer.eos_token)
    for example in examples:
        count = example.input_ids.count(tokenizer.bos_token_id)
        assert count <= 1 or (not chat.turns and count <= len(turns)), (
            "the template itself writes one for each turn"
        )


@pytest.mark.parametrize("template", ["auto", "none"])
def test_rows_that_teach_nothing_are_an_error_or_counted_and_never_a_loss_of_zero(bench, tmp_path, template):
    rows = [{"question": "a", "answer": answer} for answer in ("b", "", "c", " ", "d", "e")]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(file), "eval_fraction": 0, "chat_template": template}
    error = refused(bench.recipe(data=data), ExitCode.DATA)
    assert all(f"rows.jsonl:{line} " in error.what for line in (2, 4))
    asked = bench.recipe(data={**data, "overflow": "drop"})
    train(asked, Screen())
    file.write_text("".join(json.dumps({**row, "answer": ""}) + "\n" for row in rows))
    for overflow in ("error", "drop", "truncate"):
        refused(bench.recipe(data={**data, "overflow": overflow}), ExitCode.DATA)


# G15: the merged model is base and adapter


def test_a_trained_adapter_merged_is_base_and_adapter_and_both_stay_as_they_were(tmp_path):
    """Tied ends, Conv1D, biases, added tokens, a template of its own: GPT-2 has or gets them all at once."""
    tiny.model("gpt2", random.getrandbits(16)).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    kept = GenerationConfig(do_sample=True, temperature=0.3, eos_token_id=[2, 4])
    (tmp_path / "base" / "generation_config.json").write_text(kept.to_json_string(use_diff=False))
    template = tmp_path / "mine.jinja"
    template.write_text("{# mine #}" + tiny.CHATML)
    rows = [{"prompt": f"{a}?", "completion": f"<|think|>{a}<|answer|>{a + 1}"} for a in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokens = ("<|think|>", "<|answer|>")
    asked = Recipe.model_validate(
        {
            "model": {"name": str(tmp_path / "base"), "dtype": "float32", "add_tokens": tokens},
            "data": {"train": str(tmp_path / "rows.jsonl"), "chat_template": str(template)},
            "adapter": {"r": 2, "lora_bias": True, "train_also": ("norms",)},
            "train": {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-2},
            "output": {"dir": str(tmp_path / "run")},
        }
    )
    folder = train(asked, Screen())
    opened = open_model([folder])
    live, ids = opened.language.model.eval(), opened.language.tokenizer(rows[0]["completion"])["input_ids"]
    assert {261, 262} <= set(ids)
    (tmp_path / "rows.jsonl").unlink()  # nothing but the adapter knows how it was trained
    x = torch.tensor([ids])
    before = contents(tmp_path / "base"), contents(tmp_path / "run")
    for dtype, bound in (("float32", 1e-5), ("bfloat16", 3e-2)):
        merged = tmp_path / dtype
        merge(folder, merged, dtype, Screen())
        alone = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
        with torch.no_grad():
            assert distance(alone(x).logits, live(x).logits) <= bound
        speaks = AutoTokenizer.from_pretrained(merged)
        assert speaks.chat_template == template.read_text()
        assert speaks(rows[0]["completion"])["input_ids"] == ids
        assert GenerationConfig.from_pretrained(merged).temperature == 0.3
        assert GenerationConfig.from_pretrained(merged).eos_token_id == [2, 4]
        with pytest.raises(UserError, match="holds no adapter"):
            merge(merged, tmp_path / "twice", dtype, Screen())
    assert (contents(tmp_path / "base"), contents(tmp_path / "run")) == before


# G16: evaluation is repeatable and disturbs nothing


def test_a_run_that_is_evaluated_at_every_step_is_the_run_that_never_is(bench, tmp_path):
    rows = (bench.folder / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(rows[:9]))
    (tmp_path / "eval.jsonl").write_text("".join(rows[9:]))
    data = {"train": str(tmp_path / "train.jsonl"), "eval_fraction": 0}
    never = bench.recipe(data=data)
    always = bench.recipe(
        data={**data, "eval": str(tmp_path / "eval.jsonl")},
        train={"eval_steps": 1},
        eval={"samples": 2, "max_new_tokens": 3},
    )
    for asked in (never, always):
        train(asked, Screen())
    evaluated = [line for line in RunFolder(root_of(always)).lines() if "eval_loss" in line]
    assert len(evaluated) == 6
    for name in (checkpoint.ADAPTER, checkpoint.OPTIMIZER):
        last = Path("checkpoints") / "step-000006" / name
        assert (root_of(always) / last).read_bytes() == (root_of(never) / last).read_bytes()
    assert result(always)[0] == result(never)[0]


# G17: the same recipe gives the same bytes


def report_in(said: str) -> dict[str, Any]:
    """The report of `lora eval --json`, without the names of files."""
    line = next(line for line in said.splitlines() if line.startswith("{"))
    return {key: value for key, value in json.loads(line).items() if key not in ("path", "predictions")}


def test_a_recipe_gives_the_same_adapter_and_report_in_every_process(bench, monkeypatch):
    """Each tokenises anew, in a folder of its own, and hashes otherwise than this one."""
    wanted = {"metrics": ("loss", "exact_match"), "max_new_tokens": 3}
    monkeypatch.setenv("PYTHONHASHSEED", str(random.randrange(1, 2**32)))
    found = []
    with forker() as process:
        for _ in range(often(2, 9)):
            asked = bench.recipe(eval=wanted)
            assert process.run(["train", str(bench.file(asked))])["code"] == 0
            said = process.run(["eval", str(root_of(asked)), "--json"])["said"]
            lines = (root_of(asked) / "predictions.jsonl").read_bytes()
            found.append((result(asked), report_in(said), lines))
    train(here := bench.recipe(eval=wanted), Screen())
    report = evaluate(root_of(here), None, [], Screen())
    lines = (root_of(here) / "predictions.jsonl").read_bytes()
    again = evaluate(root_of(here) / "adapter", None, [], Screen(), output=root_of(here) / "again.jsonl")
    assert (root_of(here) / "again.jsonl").read_bytes() == lines
    for each_ in (report, again):
        assert (result(here), report_in(json.dumps(each_)), lines) == found[0]
    assert all(each_ == found[0] for each_ in found)


def test_what_is_found_tokenised_gives_the_same_bytes(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_CACHE", str(tmp_path))
    train(cold := bench.recipe(), Screen())

    def never(*_: Any) -> Any:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(formats.Format, "examples", never)
    train(warm := bench.recipe(), Screen())
    assert result(warm) == result(cold) == bench.expected


@pytest.mark.parametrize("library", ["transformers", "tokenizers", "jinja2"])
def test_another_version_of_what_makes_the_examples_is_another_key(monkeypatch, library):
    real = metadata.version
    before = cache.key(tiny.tokenizer(), "x")
    monkeypatch.setattr(metadata, "version", lambda name: real(name) + (".post1" if name == library else ""))
    assert cache.key(tiny.tokenizer(), "x") != before


# G22: what does not fit is refused before the first step, with both numbers


@pytest.fixture
def no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("a step was taken")

    monkeypatch.setattr(loop, "_step", never)


def speaking(folder: Path, **special: Any) -> Path:
    """A model whose tokenizer has one token more than its embedding has rows."""
    tiny.model(num_hidden_layers=1, max_position_embeddings=64).save_pretrained(folder)
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<|more|>"], special_tokens=True)
    for name, value in special.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return folder


BEYOND = {
    "id": ("b<|more|>c", "token id 261, .* has 261 rows", "model.name"),
    "length": ("b" * 100, r"\d{3} tokens, .* 64 positions", "data.max_length"),
}


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize(("answer", "both", "key"), BEYOND.values(), ids=BEYOND)
def test_ids_and_lengths_beyond_the_model_are_refused_before_the_first_step(
    bench, tmp_path, no_step, split, answer, both, key
):
    answers = {"train": "b", "eval": "b", split: answer}
    for name, text in answers.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": "a", "answer": text}) + "\n")
    files_ = {name: str(tmp_path / f"{name}.jsonl") for name in answers}
    asked = bench.recipe(
        model={"name": str(speaking(tmp_path / "model"))}, data={**files_, "eval_fraction": 0}
    )
    error = refused(asked, ExitCode.MODEL)
    assert re.search(both, error.what), error
    assert error.where == key
    with pytest.raises(UserError, match=both):
        check(load(bench.file(asked)), Screen(), 0)


def test_rows_may_be_as_long_as_the_model_has_positions(bench, tmp_path):
    folder = speaking(tmp_path / "model")
    for length, fits in ((63, True), (64, False)):  # and the end token
        (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "b" * length}) + "\n")
        data = {"train": str(tmp_path / "rows.jsonl"), "format": "text", "eval_fraction": 0}
        asked = bench.recipe(model={"name": str(folder)}, data=data)
        if fits:
            train(asked, Screen())
        else:
            assert "65 tokens, the model has 64 positions" in refused(asked, ExitCode.MODEL).what


def test_a_pad_token_that_the_embedding_has_no_row_for_pads_nothing(bench, tmp_path):
    rows = [{"question": "a" * n, "answer": "b"} for n in range(1, 9)]  # of other lengths: they are padded
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    digests = []
    for name, pad in (("within", "<pad>"), ("beyond", "<|more|>")):
        folder = speaking(tmp_path / name, pad_token=pad)
        data = {"train": str(tmp_path / "rows.jsonl"), "packing": False}
        train(asked := bench.recipe(model={"name": str(folder)}, data=data), Screen())
        digests.append(result(asked))
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("config", "adapter", "both"),
    [
        ({"hidden_size": 24}, {}, r"\(16, 2\) instead of \(24, 2\)"),
        ({"vocab_size": 300}, {"train_also": ("head",)}, r"\(261, 16\) instead of \(300, 16\)"),
        ({"intermediate_size": 20}, {"target_modules": ("up_proj",)}, r"\(16, 2\) instead of \(20, 2\)"),
    ],
)
def test_an_adapter_of_another_base_is_refused_with_both_shapes(bench, tmp_path, config, adapter, both):
    folder = train(bench.recipe(adapter=adapter), Screen())
    tiny.model("llama", **{**SMALL, "head_dim": 8, **config}).save_pretrained(tmp_path / "other")
    tiny.tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(UserError) as caught:
        open_model([folder], base=str(tmp_path / "other"))
    assert caught.value.code is ExitCode.MODEL
    assert re.search(both, caught.value.what), caught.value
    assert str(bench.folder / "model") in caught.value.fix
