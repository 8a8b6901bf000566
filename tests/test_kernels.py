"""Norms and gated activations by kernels: what they stand for is the same to the bit, and they are it to rounding."""

import copy
import importlib.util
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from lora_cli import kernels
from lora_cli.adapter.layer import Adapted
from lora_cli.kernels import FusedMLP, FusedRMSNorm, GeGLU, JoinedSwiGLU, RMSNorm, SwiGLU, UnfitError
from lora_cli.run.train import train
from lora_cli.screen import Screen
from lora_cli.train import loop
from tests import liger, tiny
from tests.bench import Bench, result
from tests.training import Rows, fresh, training

ROOT = Path(__file__).parents[1]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LLAMA, GEMMA, WIDE = (0.0, False), (1.0, True), (0.0, True)
"""Offset of the weights, and whether their product is in float32."""
KINDS: dict[str, dict[object, int]] = {
    "llama": {LLAMA: 5, SwiGLU: 2},
    "mistral": {LLAMA: 5, SwiGLU: 2},
    "qwen3": {LLAMA: 9, SwiGLU: 2},
    "phi3": {LLAMA: 5, JoinedSwiGLU: 2},
    "gemma2": {GEMMA: 9, GeGLU: 2},
    "gemma3_text": {GEMMA: 13, GeGLU: 2},
    "olmo2": {WIDE: 9, SwiGLU: 2},
}
"""What the models of two layers compute."""
PARTLY: dict[str, dict[object, int]] = {"cohere": {SwiGLU: 2}, "gpt_oss": {WIDE: 5}, "gpt2": {}, "phimoe": {}}
"""What is left of it where norms have a mean, experts clamp, or nothing is gated."""
OPERATIONS = (
    *(RMSNorm("cpu", 1e-5, *each) for each in (LLAMA, GEMMA, WIDE)), SwiGLU("cpu"), GeGLU("cpu"), JoinedSwiGLU("cpu")
)  # fmt: skip


def exactly(operation):
    """The definition, in the type that it is given."""
    if isinstance(operation, RMSNorm):
        return lambda x, w: (
            x / (x.square().mean(-1, keepdim=True) + operation.eps).sqrt() * (operation.offset + w)
        )
    if isinstance(operation, GeGLU):
        bent = (2 / torch.pi) ** 0.5
        return lambda gate, up: gate / 2 * (1 + torch.tanh(bent * (gate + 0.044715 * gate**3))) * up
    if isinstance(operation, JoinedSwiGLU):
        return lambda both: exactly(SwiGLU("cpu"))(*both.tensor_split(2, -1))
    return lambda gate, up: gate / (1 + torch.exp(-gate)) * up


def numbers(operation, width, dtype):
    generator = fresh()
    return [torch.randn(shape, generator=generator).to(dtype) for shape in operation.shapes(width)]


def value_and_gradients(formula, tensors):
    own = [t.clone().requires_grad_() for t in tensors]
    y = formula(*own)
    weights = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, own, weights)]


def varied(model, number):
    """The model with norms that differ from what they begin with."""
    generator = torch.Generator().manual_seed(number)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def fused(model):
    return {
        name: module for name, module in model.named_modules() if isinstance(module, FusedRMSNorm | FusedMLP)
    }


@pytest.fixture
def stood(monkeypatch):
    liger.stand_in(monkeypatch)


# What a module computes


@pytest.mark.parametrize("kind", {**KINDS, **PARTLY})
def test_modules_are_known_by_what_they_compute(kind, stood):
    model = varied(tiny.model(kind), random.getrandbits(16))
    kernels.use(model, CPU, torch.float32)
    found = (module.operation for module in fused(model).values())
    kinds = Counter((each.offset, each.wide) if isinstance(each, RMSNorm) else type(each) for each in found)
    assert dict(kinds) == {**KINDS, **PARTLY}[kind]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", {**KINDS, **PARTLY})
def test_without_a_kernel_logits_and_gradients_are_the_same_to_the_bit(kind, dtype, stood, monkeypatch):
    """As on another device than the one that the kernels are for."""
    monkeypatch.setattr(kernels.Operation, "serves", lambda *_: False)
    monkeypatch.setattr(RMSNorm, "serves", lambda *_: False)
    number, found = random.getrandbits(16), []
    ids = torch.randint(5, tiny.VOCABULARY, (2, 9), generator=fresh())
    for used in (False, True):
        model = varied(tiny.model(kind, number).to(dtype), number)
        if used:
            kernels.use(model, CPU, dtype)
        logits = model(ids, use_cache=False).logits
        logits.square().sum().backward()
        found.append(
            [logits.detach(), *(model.get_parameter(name).grad for name, _ in model.named_parameters())]
        )
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class Cut(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x).clamp(max=3.0)


class Doubled(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(2 * x)  # another eps, in effect


class Narrow(LlamaRMSNorm):
    """In 16 bits the mean is that of rounded numbers."""

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(
            x.dtype
        )


class Mixed(LlamaRMSNorm):
    """Rounds to the type of the weights, which is another one only where they are not of x's."""

    def forward(self, x):
        y = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * y.to(self.weight.dtype)


class Gated(LlamaRMSNorm):
    def forward(self, x, gate=None):
        return super().forward(x)


class Half(GemmaRMSNorm):
    def forward(self, x):
        return (self._norm(x.float()) * (0.5 + self.weight.float())).type_as(x)


class Biased(LlamaRMSNorm):
    def __init__(self, size):
        super().__init__(size)
        self.bias = nn.Parameter(torch.zeros(size))


class Stopped(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=100.0)) * self.up_proj(x))


class Dropping(LlamaMLP):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.05, self.training)


class Scaled(LlamaMLP):
    def forward(self, x):
        return super().forward(x) * 0.5


class Swapped(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class Normed(LlamaMLP):
    def __init__(self, config):
        super().__init__(config)
        self.inner = nn.Identity()


@pytest.mark.parametrize("kind", [Cut, Doubled, Narrow, Mixed, Gated, Half, Biased])
def test_another_norm_is_left_alone(kind):
    assert kernels._fused(kind(32), "cpu") is None


@pytest.mark.parametrize("kind", [Stopped, Dropping, Scaled, Swapped, Normed])
def test_another_mlp_is_left_alone(kind):
    assert kernels._fused(kind(tiny.model("llama").config), "cpu") is None


@pytest.mark.parametrize("activation", ["relu", "gelu", "quick_gelu", "tanh"])
def test_another_activation_is_left_alone(activation):
    assert kernels._fused(LlamaMLP(tiny.model("llama", hidden_act=activation).config), "cpu") is None


def test_finding_out_changes_nothing_and_draws_nothing():
    model = tiny.model("qwen3").train()
    before, state = copy.deepcopy(model), torch.get_rng_state()
    for module in model.modules():
        kernels._fused(module, "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    for ours, plain in zip(model.modules(), before.modules(), strict=True):
        assert vars(ours).keys() == vars(plain).keys()
        assert ours.training
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True)
    )


def test_parameters_keep_their_names_and_are_the_same_ones(stood):
    run = training({"target_modules": ("gate_proj", "down_proj"), "train_also": ("norms",)}, kind="gemma2")
    before = dict(run.model.named_parameters())
    adapted = {name for name, module in run.model.named_modules() if isinstance(module, Adapted)}
    assert kernels.use(run.model, CPU, torch.float32) == 11
    after = dict(run.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert {name for name, module in run.model.named_modules() if isinstance(module, Adapted)} == adapted
    assert all(module.training for module in run.model.modules())


# Kernels, as far as they can be told without one


def test_kernels_are_for_gpus_and_for_those_who_have_them(monkeypatch):
    there = {"liger_kernel", "triton"}
    monkeypatch.setattr(kernels, "find_spec", lambda name: name in there or None)
    assert kernels.serve(CUDA)
    assert not kernels.serve(CPU)
    there.discard("triton")
    assert not kernels.serve(CUDA)


@pytest.mark.parametrize("operation", OPERATIONS, ids=repr)
def test_what_a_kernel_is_not_made_for_is_computed_by_the_formula(operation, stood, monkeypatch):
    asked = []
    monkeypatch.setattr(type(operation), "kernel", lambda self, *tensors: asked.append(tensors))
    drawn = numbers(operation, 6, torch.float32)
    others = [
        [t.double() for t in drawn],
        [t[:0] if t.ndim == 3 else t for t in drawn],
        [t.to("meta") for t in drawn],
        numbers(operation, kernels.WIDEST + 2, torch.bfloat16),
    ]
    if len(drawn) == 2 and not (isinstance(operation, RMSNorm) and operation.wide):
        others.append([drawn[0].bfloat16(), drawn[1]])
    for tensors in others:
        assert isinstance(operation(*tensors), torch.Tensor)
    assert not asked
    operation(*drawn)
    assert asked


def test_a_norm_in_float32_takes_weights_that_train_beside_numbers_in_16_bits(stood):
    operation, (x, w) = RMSNorm("cpu", 1e-5, *GEMMA), numbers(RMSNorm("cpu", 1e-5, *GEMMA), 24, torch.float32)
    found = [value_and_gradients(each, [x.bfloat16(), w]) for each in (operation.kernel, operation.plain)]
    assert operation.serves(x.bfloat16(), w)
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("operation", OPERATIONS, ids=repr)
@pytest.mark.parametrize("dtype", kernels.ROUNDING)
def test_a_kernel_is_tried_out_in_value_and_gradients(operation, dtype, stood, monkeypatch):
    operation.try_out(30, dtype)
    right = type(operation).kernel
    bent = {
        "value": lambda self, *tensors: 1.1 * right(self, *tensors),
        "gradient": lambda self, *tensors: (y := right(self, *tensors)) + 0.1 * (y - y.detach()),
        "nan": lambda self, *tensors: right(self, *tensors) * float("nan"),
    }
    for wrong in bent.values():
        monkeypatch.setattr(type(operation), "kernel", wrong)
        with pytest.raises(UnfitError, match="off by"):
            operation.try_out(30, dtype)


def test_a_kernel_that_fails_leaves_the_model_as_it_was(stood, monkeypatch):
    def fail(*_):
        raise OSError("no compiler\nand more")

    monkeypatch.setattr(SwiGLU, "kernel", fail)
    model = tiny.model("llama")
    with pytest.raises(UnfitError, match=r"^SwiGLU: no compiler$"):
        kernels.use(model, CPU, torch.float32)
    assert not fused(model)


@pytest.mark.parametrize("operation", [SwiGLU("cpu"), GeGLU("cpu")], ids=repr)
def test_who_needs_what_the_kernel_writes_over_gets_an_error(operation, stood):
    x = torch.randn(3, 24, generator=fresh(), requires_grad=True)
    y = operation(x * 2, x + 1)
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    kept = x.exp()  # its gradient is made of its value
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        operation(kept, x + 1).sum().backward()


# Training


@pytest.mark.parametrize("also", [(), ("norms",)], ids=["frozen norms", "trained norms"])
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", ["qwen3", "phi3", "gemma2"])
def test_steps_are_those_without_kernels(kind, recomputed, also, stood, monkeypatch):
    number, rows, found = random.getrandbits(16), Rows(8), []
    for used in (False, True):
        how = {"max_steps": 3, "gradient_checkpointing": recomputed, "optimizer": "sgd"}
        run = training({"dropout": 0.0, "train_also": also}, how, kind=kind, seed=number, rows=rows)
        if used:
            kernels.use(run.model, CPU, torch.float32)
            liger.only_kernels(monkeypatch)
        losses = [report.loss for report in loop.train_steps(run)]
        found.append((losses, {name: p.detach().clone() for name, p in run.adapter.trainable().items()}))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    for name, tensor in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], tensor, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("kernels"))


class StopError(Exception):
    pass


def test_a_run_says_that_it_uses_them_and_goes_on_to_the_same_bytes(bench, stood, monkeypatch, capsys):
    whole, halves = (bench.recipe(train={"deterministic": True}) for _ in range(2))
    train(whole, Screen())
    assert "liger-kernel computes 4 norms and gated activations" in capsys.readouterr().err
    real = loop._update

    def update(run, norm):
        real(run, norm)
        if run.step == 4:
            raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_update", update)
        with pytest.raises(StopError):
            train(halves, Screen())
    train(halves, Screen(), resume=True)
    assert result(halves) == result(whole)


def test_a_run_says_that_they_do_not_work_and_goes_on_without(bench, stood, monkeypatch, capsys):
    plain, without = bench.recipe(), bench.recipe()
    monkeypatch.setattr(SwiGLU, "kernel", lambda self, gate, up: gate * up)
    train(without, Screen())
    assert (
        "training without liger-kernel, which does not work here: SwiGLU in float32"
        in capsys.readouterr().err
    )
    monkeypatch.setattr(kernels, "serve", lambda device: False)
    train(plain, Screen())
    assert result(plain) == result(without)


# Liger's own


def test_all_of_it_holds_for_ligers_kernels_in_tritons_interpreter():
    """In a process of its own: Triton decides when it is imported whether it compiles."""
    for name in ("triton", "liger_kernel"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install --no-deps triton liger-kernel")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/interpreted.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-4000:]
