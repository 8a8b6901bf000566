"""LoRA+ gives B a rate of its own, LoRA-FA makes of B's gradient the best that B can do, SGD does what it says."""

import random
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.pytorch_utils import Conv1D

from lora_cli import parts
from lora_cli.adapter.delta import Place
from lora_cli.adapter.layer import Adapted
from lora_cli.adapter.plan import view_of
from lora_cli.methods.optimizer import lora_fa
from lora_cli.recipe.schema import TrainRecipe
from lora_cli.train import optim
from lora_cli.train.loop import Training, train_steps
from tests import tiny
from tests.training import distance, loss_of, training

EPS = 1e-8
"""Of Adam: a gradient that is far smaller moves a tensor in proportion to it, as SGD would."""


@pytest.fixture(autouse=True)
def _other_numbers_in_every_session():
    torch.manual_seed(random.getrandbits(48))


def step_in_proportion(run: Training, learning_rate: float) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> gradient, and what one step of the optimizer makes of it, from zero."""
    optim.set_learning_rate(run.optimizer, learning_rate)
    named = run.adapter.trainable()
    with torch.no_grad():
        for parameter in named.values():
            parameter.zero_()
            parameter.grad = torch.randn_like(parameter) * 1e-12
    gradients = {name: p.grad.clone() for name, p in named.items()}
    run.optimizer.step()
    return {name: (gradients[name], p.detach().clone()) for name, p in named.items()}


# ---- lora_plus --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [16.0, 3.5])
def test_b_moves_ratio_times_as_far_as_a_for_its_gradient(ratio):
    """After one step ‖ΔB‖ / ‖ΔA‖ = λ·‖g_B‖ / ‖g_A‖."""
    run = training({"method": "lora_plus"}, {"optimizer": {"lora_plus": {"ratio": ratio}}})
    found = step_in_proportion(run, 0.01)
    for layer in run.adapter.deltas:
        (g_A, A), (g_B, B) = found[f"{layer}.A"], found[f"{layer}.B"]
        expected = ratio * (g_B.norm() / g_A.norm()).item()
        assert (B.norm() / A.norm()).item() == pytest.approx(expected, rel=1e-3)
        assert distance(A, -0.01 * g_A / EPS) < 1e-3
        assert distance(B, -0.01 * ratio * g_B / EPS) < 1e-3


FAST_AND_SLOW: dict[str, tuple[str, dict[str, Any]]] = {
    "bias of B, norms, biases": ("gpt2", {"lora_bias": True, "train_also": ("norms", "biases")}),
    "magnitudes": ("llama", {"combine": "dora"}),
    "head in full": ("llama", {"train_also": ("head",)}),
    "embedding": ("llama", {"target_modules": ("embed_tokens", "q_proj")}),
    "gates": ("llama", {"delta": "gated", "init": "small", "rank": "adalora"}),
}


@pytest.mark.parametrize(("kind", "adapter"), FAST_AND_SLOW.values(), ids=FAST_AND_SLOW)
def test_every_tensor_is_in_one_group_only_b_is_fast_and_vectors_are_not_decayed(kind, adapter):
    run = training({"method": "lora_plus", **adapter}, {"weight_decay": 0.07}, kind=kind)
    groups = run.optimizer.param_groups
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in run.adapter.trainable().values())
    optim.set_learning_rate(run.optimizer, 0.01)
    of = {id(p): group for group in groups for p in group["params"]}
    for name, parameter in run.adapter.trainable().items():
        group = of[id(parameter)]
        assert group["lr"] == (0.16 if name.endswith(".B") else 0.01), name
        assert group["weight_decay"] == (0.07 if parameter.ndim > 1 else 0.0), name
        assert name in group["names"]
    assert {group["lr"] for group in groups} == {0.16, 0.01}


def test_the_schedule_multiplies_both_rates():
    train = {"max_steps": 8, "warmup_steps": 3, "lr_scheduler": "cosine", "learning_rate": 1e-3}
    run = training({"method": "lora_plus"}, train)
    seen: list[tuple[float, float]] = []
    for report in train_steps(run):
        rates = {group["lr_ratio"]: group["lr"] for group in run.optimizer.param_groups}
        assert rates[1.0] == report.learning_rate
        seen.append((rates[1.0], rates[16.0]))
    assert len({slow for slow, _ in seen}) > 5
    assert all(fast == pytest.approx(16 * slow, rel=1e-12) for slow, fast in seen)


def test_decay_is_the_recipes_at_each_rate():
    """AdamW: with no gradient w ← w·(1 − η·decay), η being that of the group."""
    run = training({"method": "lora_plus"}, {"weight_decay": 0.1})
    optim.set_learning_rate(run.optimizer, 0.01)
    named = run.adapter.trainable()
    with torch.no_grad():
        for parameter in named.values():
            parameter.normal_()
            parameter.grad = torch.zeros_like(parameter)
    before = {name: p.detach().clone() for name, p in named.items()}
    run.optimizer.step()
    for name, parameter in named.items():
        rate = 0.16 if name.endswith(".B") else 0.01
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - rate * 0.1))


# ---- lora_fa ----------------------------------------------------------------------------------------------------


def projection(out: int, width: int, r: int, scale: float) -> tuple[Tensor, nn.Parameter, Tensor]:
    """G, A, and s·g'·A with g' made of the gradient that B has: s·G·Aᵀ."""
    G, A = torch.randn(out, width), nn.Parameter(torch.randn(r, width) / width**0.5)
    corrected = lora_fa.projected(scale * G @ A.detach().t(), A, scale)
    return G, A, scale * corrected @ A.detach()


@pytest.mark.parametrize(("out", "width", "r"), [(20, 12, 4), (12, 20, 8), (16, 16, 1), (48, 32, 16)])
@pytest.mark.parametrize("scale", [2.0, 0.3])
def test_correction_is_the_least_squares_projection_of_the_full_gradient(out, width, r, scale):
    G, A, found = projection(out, width, r, scale)
    residual = (G - found) @ A.detach().t()
    assert residual.norm() <= 1e-5 * (G @ A.detach().t()).norm(), "the normal equations"
    best = torch.linalg.lstsq(A.detach().double().t(), G.double().t()).solution.t() @ A.detach().double()
    assert distance(found, best) < 1e-5


def test_correction_survives_rows_of_a_that_depend_on_one_another():
    """Two that are the same, one that is zero, more than there are inputs: the projection is the same."""
    G = torch.randn(9, 6)
    A = torch.randn(8, 6)
    A[1], A[2] = A[0], 0
    found = lora_fa.projected(0.5 * G @ A.t(), nn.Parameter(A), 0.5)
    assert torch.isfinite(found).all()
    assert distance(0.5 * found @ A, G) < 1e-2


def test_a_step_is_that_of_the_corrected_gradient():
    run = training({"method": "lora_fa"})
    optim.set_learning_rate(run.optimizer, 0.01)
    gradients: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, delta in run.adapter.deltas.items():
            gradients[name] = delta.B.grad = torch.randn_like(delta.B) * 1e-13
    run.optimizer.step()
    for name, delta in run.adapter.deltas.items():
        A, s = delta.A.detach().double(), delta.scale
        expected = gradients[name].double() @ torch.linalg.inv(A @ A.t()) / s**2
        assert distance(delta.B.detach(), -0.01 * expected / EPS) < 1e-3


def test_a_stays_to_the_bit_and_has_no_state():
    run = training({"method": "lora_fa"}, {"max_steps": 4, "learning_rate": 0.01, "weight_decay": 0.1})
    before = {name: delta.A.detach().clone() for name, delta in run.adapter.deltas.items()}
    list(train_steps(run))
    for name, delta in run.adapter.deltas.items():
        assert torch.equal(delta.A, before[name])
        assert delta.A.grad is None
        assert torch.count_nonzero(delta.B)
    assert run.optimizer.state.keys() == {delta.B for delta in run.adapter.deltas.values()}
    planned = sum(spec.num_trainable for spec in run.adapter.plan.layers)
    assert planned == sum(spec.r * spec.out_features for spec in run.adapter.plan.layers)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_what_a_layer_keeps_for_backward_is_r_wide(kind):
    tokens, width, out, r = 7, 12, 20, 4
    module = nn.Linear(width, out) if kind == "linear" else Conv1D(out, width)
    base = view_of(module.requires_grad_(False))[1]

    def kept(method: str) -> set[tuple[int, ...]]:
        delta = parts.load("delta", "lowrank").make(Place(base, r, 0.7))
        for key, parameter in delta.named_parameters():
            parameter.requires_grad_(parts.load("trainable", method).trains(key))
        nn.init.normal_(delta.A)
        nn.init.normal_(delta.B)
        shapes: list[tuple[int, ...]] = []
        x = torch.randn(tokens, width, requires_grad=True)
        with saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
            y = Adapted(base, delta)(x * 1.0)
        y.sum().backward()
        assert x.grad is not None
        return {shape for shape in shapes if tokens in shape}

    assert kept("lora_fa") == {(tokens, r)}
    assert (tokens, width) in kept("all")


# ---- sgd ------------------------------------------------------------------------------------------------------------


def test_sgd_is_the_closed_form_and_remembers_nothing():
    w, v = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(4))
    groups = [
        {"params": [w], "names": ["w"], "weight_decay": 0.1},
        {"params": [v], "names": ["v"], "weight_decay": 0.0},
    ]
    optimizer = parts.load("optimizer", "sgd").make(groups, TrainRecipe(learning_rate=0.5), None)
    for _ in range(3):
        w.grad, v.grad = torch.randn_like(w), torch.randn_like(v)
        expected = w.detach() * (1 - 0.5 * 0.1) - 0.5 * w.grad, v.detach() - 0.5 * v.grad
        optimizer.step()
        torch.testing.assert_close((w.detach(), v.detach()), expected)
    assert not any(state.get("momentum_buffer") is not None for state in optimizer.state.values())


def test_a_step_of_sgd_on_a_model_is_minus_rate_times_the_gradient_of_the_mean_loss():
    run = training({"init": "symmetric"}, {"optimizer": "sgd", "learning_rate": 0.3, "micro_batch_size": 2})
    named = run.adapter.trainable()
    gradients = torch.autograd.grad(loss_of(run, run.model, 0), list(named.values()))
    before = {name: p.detach().clone() for name, p in named.items()}
    report = next(train_steps(run))
    for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
        change = parameter.detach() - before[name]
        torch.testing.assert_close(change, -report.learning_rate * gradient, rtol=1e-4, atol=1e-7)


# ---- PEFT ------------------------------------------------------------------------------------------------------------

peft = pytest.importorskip("peft")


@pytest.mark.oracle
@pytest.mark.parametrize("scale", ["alpha_over_r", "rslora"])
def test_correction_of_lora_fa_is_pefts(scale, monkeypatch):
    """Read off PEFT's first step, also in proportion to a tiny gradient; without its rounding to bfloat16."""
    from peft.optimizers import create_lorafa_optimizer
    from peft.optimizers import lorafa as theirs

    monkeypatch.setattr(theirs, "is_bf16_available", lambda: False)
    run = training({"method": "lora_fa", "scale": scale, "alpha": 12.0})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT about what it was asked for
        config = peft.LoraConfig(
            r=4, lora_alpha=12, target_modules="all-linear", use_rslora=scale == "rslora"
        )
        model = peft.get_peft_model(tiny.model("llama"), config)
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=12, lr=1.0)
    layers = {name: model.base_model.model.get_submodule(name) for name in run.adapter.deltas}
    with torch.no_grad():
        for name, delta in run.adapter.deltas.items():
            layers[name].lora_A["default"].weight.copy_(delta.A)
            delta.B.grad = torch.randn_like(delta.B) * 1e-12
            layers[name].lora_B["default"].weight.grad = delta.B.grad.clone()
    optimizer.step()
    lora_fa.correct(list(run.adapter.deltas.values()))
    for name, delta in run.adapter.deltas.items():
        step = layers[name].lora_B["default"].weight.detach()
        read = (
            -step * 1e-6 / (1 - 0.999) ** 0.5
        )  # PEFT's eps, and √v̂ before it is divided by its bias correction
        assert distance(delta.B.grad, read) < 1e-4


@pytest.mark.oracle
def test_rates_of_lora_plus_are_pefts_but_for_what_is_no_matrix():
    from peft.optimizers import create_loraplus_optimizer

    run = training({"method": "lora_plus"})
    optim.set_learning_rate(run.optimizer, 1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT about what it was asked for
        config = peft.LoraConfig(r=4, target_modules="all-linear")
        model = peft.get_peft_model(tiny.model("llama"), config)
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    theirs = {
        name.split("model.", 2)[-1].replace(".default.weight", ""): rates[id(p)] for name, p in named.items()
    }
    of = {id(p): group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    mine = {name: of[id(p)] for name, p in run.adapter.trainable().items()}
    assert {name.replace("lora_", "").removeprefix("model."): rate for name, rate in theirs.items()} == {
        name.removeprefix("model."): rate for name, rate in mine.items()
    }
