"""Methods that are a view of the gradient, against float64 definitions, autograd, hand-written loops and PEFT.

symmetric, optimizer_view, random_projection, additive, miss, flora, galore; G = ∂L/∂W [out, in] throughout.
"""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lora_cli import model as models
from lora_cli import parts
from lora_cli.adapter import files, inject, plan
from lora_cli.adapter.base import Base
from lora_cli.adapter.delta import Delta, LowRank, Place
from lora_cli.adapter.plan import view_of
from lora_cli.adapter.portable import as_lora, saved_form
from lora_cli.adapter.seed import generator_of
from lora_cli.adapter.start import Start
from lora_cli.errors import UserError
from lora_cli.methods.combine.optimizer_view import OptimizerView
from lora_cli.parts import Part
from lora_cli.presets import PRESETS
from lora_cli.recipe.schema import AdapterRecipe
from lora_cli.train import loop
from tests import tiny
from tests.adapters import put_on
from tests.training import (
    Rows,
    batch_of,
    distance,
    fresh,
    gradients,
    loss_of,
    originals,
    plain,
    rank_of,
    training,
    weights,
    write,
)

IN, OUT, R = 24, 36, 4
KINDS = ("linear", "conv1d")


def base_of(kind: str, generator: torch.Generator, in_features: int = IN, out_features: int = OUT) -> Base:
    """A random frozen layer."""
    module = nn.Linear(in_features, out_features) if kind == "linear" else Conv1D(out_features, in_features)
    for parameter in module.parameters():
        parameter.data.normal_(0, in_features**-0.5, generator=generator)
    view = view_of(module.requires_grad_(False))
    assert view is not None
    return view[1]


def started(delta: str, init: str, base: Base, scale: float, generator: torch.Generator, r: int = R) -> Delta:
    """A delta at its first step."""
    made = parts.load("delta", delta).make(Place(base, r, scale))
    with torch.no_grad():
        part = parts.load("init", init)
        part.init(made, Start(base, generator), **parts.settings("init", Part(init)))
    return made


def randomise(delta: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.normal_(generator=generator)


def seed() -> int:
    return random.getrandbits(30)


def logits(run: loop.Training, model: nn.Module, step: int = 0) -> Tensor:
    batch = batch_of(run, step)
    with torch.no_grad():
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits


# ---- symmetric --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_symmetric_starts_at_the_base_with_a_gradient_in_both_factors(kind):
    run = training({"method": "symmetric"}, kind=kind, seed=seed())
    with inject.without_adapters(run.adapter):
        base = logits(run, run.model)
    assert distance(logits(run, run.model), base) <= 1e-6
    loss_of(run, run.model, 0).backward()
    assert all(torch.count_nonzero(p.grad) > p.numel() / 2 for p in run.adapter.trainable().values())
    plain_lora = training({}, kind=kind, seed=seed())
    loss_of(plain_lora, plain_lora.model, 0).backward()
    still = {name for name, p in plain_lora.adapter.trainable().items() if not torch.count_nonzero(p.grad)}
    assert still == {name for name in plain_lora.adapter.trainable() if name.endswith(".A")}


@pytest.mark.parametrize("size", [0.05, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_symmetric_start_has_the_size_that_is_asked_for(kind, size):
    base, generator = base_of(kind, fresh()), fresh()
    delta = LowRank(Place(base, R, 1.7))
    with torch.no_grad():
        parts.load("init", "symmetric").init(delta, Start(base, generator), size=size)
    product = 1.7 * (delta.B.detach().double() @ delta.A.detach().double())
    share = torch.linalg.norm(product) / torch.linalg.norm(base.weight())
    assert share.item() == pytest.approx(size, rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_symmetric_is_saved_as_lora_of_twice_the_rank_on_the_original_base(tmp_path, kind):
    number = seed()
    run = training(
        {"method": "symmetric", "rank_pattern": {"q_proj|c_attn": 3}},
        {"learning_rate": 1e-2, "max_steps": 5},
        kind=kind,
        seed=number,
    )
    list(loop.train_steps(run))
    portable = as_lora(run.adapter)
    assert portable is not None
    assert [spec.r for spec in portable.plan.layers] == [2 * spec.r for spec in run.adapter.plan.layers]
    files.save(tmp_path, run.adapter, "the/base", None)
    original = tiny.model(kind, number)
    before = logits(run, original)
    put_on(original, tmp_path)
    live = logits(run, run.model.eval())
    assert distance(logits(run, original), live) <= 1e-6
    assert distance(before, live) > 1e-4


# ---- optimizer_view -----------------------------------------------------------------------------------------------


def lora_and_view(kind: str, **shape: int) -> tuple[nn.Module, OptimizerView]:
    """Plain LoRA and its view as an optimizer on one base, from one start."""
    base, number = base_of(kind, fresh(), **shape), seed()
    deltas = [started("lowrank", "kaiming", base, 2.0, torch.Generator().manual_seed(number)) for _ in "ab"]
    lora, view = (
        parts.load("combine", name).make(base, d)
        for name, d in zip(("add", "optimizer_view"), deltas, strict=True)
    )
    return lora, view


OPTIMIZERS = {
    "adamw": lambda named: torch.optim.AdamW(named, lr=1e-2, weight_decay=0.1, fused=True),
    "sgd": lambda named: torch.optim.SGD(named, lr=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_optimizer_view_of_a_layer_takes_the_same_50_steps_as_lora(kind, optimizer):
    generator = fresh()
    lora, view = lora_and_view(kind)
    x, target = torch.randn(50, 8, IN, generator=generator), torch.randn(50, 8, OUT, generator=generator)
    start = lora.merged_weight()
    for layer in (lora, view):
        stepping = OPTIMIZERS[optimizer](layer.delta.parameters())
        for inputs, expected in zip(x, target, strict=True):
            F.mse_loss(layer(inputs), expected).backward()
            stepping.step()
            stepping.zero_grad()
    for factor in ("A", "B"):
        assert distance(view.delta.get_parameter(factor), lora.delta.get_parameter(factor)) <= 1e-5, factor
    assert distance(view.merged_weight() - start, lora.merged_weight() - start) <= 1e-5
    torch.testing.assert_close(view(x[0]), lora(x[0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        ("sgd", {}),
        ("adamw", {}),
        ("adamw", {"micro_batch_size": 4}),
        ("adamw", {"gradient_checkpointing": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_optimizer_view_of_a_model_takes_the_same_steps_as_lora(kind, optimizer, settings):
    number, rows, found = seed(), Rows(), []
    common = {
        "optimizer": optimizer,
        "learning_rate": {"adamw": 2e-4, "sgd": 0.02}[optimizer],
        "max_steps": 50,
        "batch_size": 12,
    }
    for method, extra in (("lora", {}), ("optimizer_view", settings)):
        run = training({"method": method}, {**common, **extra}, kind=kind, seed=number, rows=rows)
        found.append((run, [report.loss for report in loop.train_steps(run)]))
    (lora, losses), (view, others) = found
    assert others == pytest.approx(losses, abs=1e-5)
    # AdamW steps by the sign of a gradient that is all rounding, so that a few entries of a factor go another way.
    near = {"adamw": 1e-3, "sgd": 1e-5}[optimizer]
    for name, parameter in view.adapter.named_tensors().items():
        assert distance(parameter, lora.adapter.named_tensors()[name]) <= near, name
    for name, W in weights(view).items():
        assert distance(W, weights(lora)[name]) <= 1e-5
    assert losses[-1] < losses[0]


def test_optimizer_view_remembers_two_numbers_for_each_of_a_and_b():
    run = training({"method": "optimizer_view"}, {"max_steps": 2})
    list(loop.train_steps(run))
    kept = [t for state in run.optimizer.state.values() for t in state.values() if t.ndim]
    layers = run.adapter.plan.layers
    assert sum(t.numel() for t in kept) == sum(2 * s.r * (s.in_features + s.out_features) for s in layers)
    assert all(layer.folded().grad is None for layer in run.adapter.layers.values())


class Alive:
    """Counts the gradients of weights that are in memory at once, whoever holds them."""

    def __init__(self) -> None:
        self.seen: list[StorageWeakRef] = []
        self.most = 0

    def __call__(self, gradient: Tensor) -> None:
        self.most = max(self.most, 1 + sum(not other.expired() for other in self.seen))
        self.seen.append(StorageWeakRef(gradient.untyped_storage()))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_optimizer_view_never_has_the_full_gradient_of_two_layers(checkpointing):
    run = training({"method": "optimizer_view"}, {"gradient_checkpointing": checkpointing})
    loss_of(run, run.model, 0).backward()
    alive = Alive()
    for layer in run.adapter.layers.values():
        layer.folded().register_hook(alive)
    loss_of(run, run.model, 0).backward()
    assert (len(alive.seen), alive.most) == (len(run.adapter.layers), 1)
    whole, many = plain(run), Alive()
    for name in run.adapter.layers:
        whole.get_parameter(f"{name}.weight").register_hook(many)
    loss_of(run, whole, 0).backward()
    assert many.most == len(run.adapter.layers), "the count can tell"


def test_optimizer_view_follows_momentum_in_a_layer_that_had_no_gradient():
    """As an expert that no token goes to: A and B move on, and a fused optimizer leaves no trace of it in them."""
    lora, view = lora_and_view("linear")
    x = torch.randn(8, IN, generator=fresh())
    for layer in (lora, view):
        stepping = OPTIMIZERS["adamw"](layer.delta.parameters())
        for _ in range(2):
            layer(x).square().mean().backward()
            stepping.step()
            stepping.zero_grad()
        layer.eval()(x)
        layer.train()
        for parameter in layer.delta.parameters():
            parameter.grad = torch.zeros_like(parameter)
        stepping.step()
    torch.testing.assert_close(view(x), lora(x), rtol=0, atol=1e-5)


def test_optimizer_view_computes_in_the_type_of_a_plain_layer():
    lora, view = lora_and_view("linear")
    x = torch.randn(8, IN, generator=fresh())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert view(x).dtype is lora(x).dtype is torch.bfloat16
    half = nn.Linear(IN, OUT).bfloat16().requires_grad_(False)
    base = view_of(half)[1]
    layer = OptimizerView(base, started("lowrank", "kaiming", base, 2.0, fresh()))
    assert layer(x.bfloat16()).dtype is torch.bfloat16
    layer(x.bfloat16()).sum().backward()
    assert layer.delta.B.grad.dtype is torch.float32


# ---- random_projection ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_step_of_random_projection_is_the_definition(kind):
    """ΔW = −(η/2)·(G·QᵀQ + P·PᵀG), in float64, for the P and Q that were drawn."""
    rate = 0.5
    run = training(
        {"method": "random_projection"},
        {"learning_rate": rate, "lr_scheduler": "constant", "max_steps": 4},
        kind=kind,
        seed=seed(),
    )
    steps, model = loop.train_steps(run), plain(run)
    for step in range(4):
        before = weights(run)
        write(run, model, before)
        G = gradients(run, model, step)
        drawn = {
            name: [delta.get_parameter(key).detach().double().clone() for key in ("P", "Q")]
            for name, delta in run.adapter.deltas.items()
        }
        next(steps)
        for name, W in weights(run).items():
            P, Q = drawn[name]
            expected = -rate / 2 * (G[name] @ Q.t() @ Q + P @ P.t() @ G[name])
            assert distance(W - before[name], expected) <= 1e-4, (step, name)
            assert rank_of(W - before[name], 1e-4) <= 2 * 4


def known_loss(delta: Delta, G: Tensor) -> Tensor:
    """⟨G, ΔW⟩, so that ∂L/∂W is G."""
    y = delta.add_to(torch.zeros(G.shape[1], G.shape[0]), torch.eye(G.shape[1]))
    return (y.t() * G).sum()


def mean_squared_error(delta: str, scale: float, draws: int, groups: int) -> tuple[float, float]:
    """‖mean over `draws` of −ΔW/η − G‖² / ‖G‖² for steps of SGD, its mean over groups and the error of that mean."""
    generator, number, r = fresh(), seed(), 3
    base = base_of("linear", generator, 10, 14)
    G = torch.randn(14, 10, generator=generator)
    errors = []
    for group in range(groups):
        total = torch.zeros_like(G)
        for draw in range(draws):
            made = started(
                delta, "random_projection", base, scale, generator_of(number, f"{group} {draw}"), r
            )
            trained = {key: p for key, p in made.named_parameters() if p.requires_grad}
            chosen = [trained["B"]] if delta == "lowrank" else list(trained.values())
            found = torch.autograd.grad(known_loss(made, G), chosen)
            with torch.no_grad():
                for parameter, gradient in zip(chosen, found, strict=True):
                    parameter -= gradient
            total -= made.weight()
        errors.append(((total / draws - G).square().sum() / G.square().sum()).item())
    errors = torch.tensor(errors, dtype=torch.float64)
    return errors.mean().item(), (errors.std() / groups**0.5).item()


def test_random_projection_is_the_gradient_on_average():
    """Relative error of the mean of T draws: ½·√((out + in + 2)/(r·T)), within 3σ of what chance allows."""
    scale = parts.settings("scale", PRESETS["random_projection"].parts["scale"])["value"]
    mean, error = mean_squared_error("two_sided", scale, draws=30, groups=40)
    assert mean == pytest.approx((14 + 10 + 2) / (4 * 3 * 30), abs=3.5 * error)


def test_random_projection_follows_from_the_seed_to_the_bit():
    number, rows = seed(), Rows()
    found = []
    for start in (5, 5, 6):
        run = training(
            {"method": "random_projection"},
            {"learning_rate": 0.3, "max_steps": 4, "seed": start},
            seed=number,
            rows=rows,
        )
        list(loop.train_steps(run))
        found.append({name: layer.merged_weight() for name, layer in run.adapter.layers.items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not any(torch.equal(found[0][name], found[2][name]) for name in found[0])


def test_random_projection_draws_other_directions_in_every_step_and_layer():
    run = training({"method": "random_projection"}, {"learning_rate": 0.3, "max_steps": 4})
    seen = []
    for _ in loop.train_steps(run):
        seen += [
            delta.get_parameter("P").detach().flatten()[:60].clone() for delta in run.adapter.deltas.values()
        ]
    # After the last step nothing is drawn any more.
    seen = seen[: -len(run.adapter.deltas)]
    assert len({tuple(drawn.tolist()) for drawn in seen}) == len(seen)


# ---- additive and miss ------------------------------------------------------------------------------------------

SHAPES = [(24, 36, 4), (12, 6, 1), (6, 12, 3), (8, 8, 8)]


@pytest.mark.parametrize(("in_features", "out_features", "r"), SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_additive_is_the_sum_of_one_number_of_each_factor(kind, in_features, out_features, r):
    generator = fresh()
    base = base_of(kind, generator, in_features, out_features)
    delta = started("additive", "own", base, 0.7, generator, r)
    randomise(delta, generator)
    A, B = delta.A.detach().double(), delta.B.detach().double()
    expected = torch.tensor(
        [[0.7 * (B[a, b % r] + A[a % r, b]).item() for b in range(in_features)] for a in range(out_features)]
    )
    torch.testing.assert_close(delta.weight(), expected)
    x = torch.randn(3, 5, in_features, generator=generator)
    y = torch.randn(3, 5, out_features, generator=generator)
    torch.testing.assert_close(delta.add_to(y, x), y + x @ expected.t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("in_features", "out_features", "r"), SHAPES)
def test_additive_has_rank_2r_and_the_freedom_of_a_gauge(in_features, out_features, r):
    """(B + QᵀC, A − C·P) is the same ΔW for every C [r, r]."""
    generator = fresh()
    delta = started(
        "additive", "own", base_of("linear", generator, in_features, out_features), 1.0, generator, r
    )
    randomise(delta, generator)
    before = delta.weight().clone()
    assert rank_of(before) == min(2 * r, in_features, out_features)
    C = torch.randn(r, r, generator=generator)
    P, Q = torch.eye(r).repeat(1, in_features // r), torch.eye(r).repeat(1, out_features // r)
    with torch.no_grad():
        delta.B += Q.t() @ C
        delta.A -= C @ P
    torch.testing.assert_close(delta.weight(), before, rtol=0, atol=5e-6)


@pytest.mark.parametrize("method", ["additive", "miss"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_additive_starts_at_zero_with_the_gradient_of_the_definition(kind, method):
    """∂L/∂B = s·G·Pᵀ, sums over blocks of columns; ∂L/∂A = s·Q·G, over blocks of rows. In float64."""
    run = training({"method": method}, kind=kind, seed=seed())
    assert not any(torch.count_nonzero(p) for p in run.adapter.trainable().values())
    G = gradients(run, plain(run), 0)
    run.model.double()
    loss_of(run, run.model, 0).backward()
    for name, delta in run.adapter.deltas.items():
        by_columns = G[name].unflatten(1, (-1, 4)).sum(1)
        torch.testing.assert_close(delta.get_parameter("B").grad, by_columns, rtol=1e-5, atol=1e-9)
        assert torch.count_nonzero(by_columns)
        if method == "additive":
            by_rows = G[name].unflatten(0, (-1, 4)).sum(0)
            torch.testing.assert_close(delta.get_parameter("A").grad, by_rows, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("method", "times"), [("additive", 2), ("miss", 1)])
def test_additive_is_saved_as_lora_that_computes_the_same(tmp_path, method, times):
    number = seed()
    run = training({"method": method}, {"learning_rate": 1e-2, "max_steps": 5}, seed=number)
    list(loop.train_steps(run))
    assert {spec.r for spec in saved_form(run.adapter).plan.layers} == {times * 4}
    files.save(tmp_path, run.adapter, "the/base", None)
    original = tiny.model("llama", number)
    adapter = put_on(original, tmp_path)
    assert adapter.plan.method.delta.name == "lowrank"
    assert distance(logits(run, original), logits(run, run.model.eval())) <= 1e-6


@pytest.mark.parametrize(
    ("method", "r", "layer"), [("additive", 5, "q_proj"), ("additive", 32, "k_proj"), ("miss", 5, "q_proj")]
)
def test_a_shape_that_r_does_not_divide_is_refused_by_the_plan(method, r, layer):
    model = tiny.model()
    with pytest.raises(UserError, match=rf"{layer}.*r = {r} has to divide") as caught:
        plan.make(AdapterRecipe(method=method, r=r), model, models.ends_of(model))
    assert caught.value.where == "adapter.r"


def test_miss_may_have_an_r_that_divides_the_inputs_only():
    model = tiny.model()
    recipe = AdapterRecipe(method="miss", r=32, target_modules=("k_proj",))
    made = inject.inject(model, plan.make(recipe, model, models.ends_of(model)))
    assert {tuple(p.shape) for p in made.trainable().values()} == {(16, 32)}


def test_miss_is_additive_without_a():
    generator = fresh()
    base = base_of("linear", generator)
    whole, half = (started(name, "own", base, 0.7, generator) for name in ("additive", "miss"))
    randomise(half, generator)
    with torch.no_grad():
        whole.B.copy_(half.B)
    torch.testing.assert_close(half.weight(), whole.weight())
    x, y = torch.randn(9, IN, generator=generator), torch.zeros(9, OUT)
    torch.testing.assert_close(half.add_to(y, x), whole.add_to(y, x), rtol=0, atol=1e-5)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_miss_learns_what_peft_learns():
    peft = pytest.importorskip("peft")
    number = seed()
    run = training(
        {"method": "miss", "target_modules": ("q_proj", "down_proj")},
        {"learning_rate": 1e-2, "lr_scheduler": "constant", "max_steps": 6, "weight_decay": 0.1},
        seed=number,
    )
    config = peft.MissConfig(r=4, target_modules=["q_proj", "down_proj"])
    other = peft.get_peft_model(tiny.model("llama", number), config)
    trained = [p for p in other.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    for step, report in enumerate(loop.train_steps(run)):
        loss = loss_of(run, other, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert report.loss == pytest.approx(loss.item(), rel=1e-6)
        assert distance(logits(run, run.model), logits(run, other)) <= 1e-5
    blocks = {
        name.removeprefix("base_model.model."): p for name, p in other.named_parameters() if "miss" in name
    }
    for name, delta in run.adapter.deltas.items():
        theirs = blocks[f"{name}.miss_block.default"].t()
        assert distance(delta.get_parameter("B"), theirs) <= 1e-4, name


# ---- flora --------------------------------------------------------------------------------------------------------


def test_flora_compresses_to_the_gradient_on_average():
    """E[G·AᵀA] = G; relative error of the mean of T draws √((in + 1)/(r·T))."""
    scale = parts.settings("scale", PRESETS["flora"].parts["scale"])["value"]
    mean, error = mean_squared_error("lowrank", scale, draws=30, groups=40)
    assert mean == pytest.approx((10 + 1) / (3 * 30), abs=3.5 * error)


def test_flora_is_adam_on_the_compressed_gradient():
    """W_T − W0 = Z·A, where Adam moves Z by G·Aᵀ: in float64, by hand."""
    rate = 1e-2
    run = training(
        {"method": "flora"}, {"learning_rate": rate, "lr_scheduler": "constant", "max_steps": 6}, seed=seed()
    )
    A = {
        name: delta.get_parameter("A").detach().double().clone() for name, delta in run.adapter.deltas.items()
    }
    expected = by_hand(run, rate, lambda name, G: G @ A[name].t(), lambda name, Z: Z @ A[name])
    W0 = originals(run)
    list(loop.train_steps(run))
    for name, W in weights(run).items():
        assert distance(W - W0[name], expected[name] - W0[name]) <= 5e-2, name


Projection = Callable[[str, Tensor], Tensor]


def by_hand(run: loop.Training, rate: float, down: Projection, up: Projection) -> dict[str, Tensor]:
    """W after all steps of Adam on `down` of the gradient, W moving by `up` of Adam's steps; in float64."""
    model, W = plain(run), originals(run)
    m, v = {}, {}
    for step in range(run.total_steps):
        write(run, model, W)
        for name, G in gradients(run, model, step).items():
            g = down(name, G)
            m[name] = 0.9 * m.get(name, torch.zeros_like(g)) + 0.1 * g
            v[name] = 0.999 * v.get(name, torch.zeros_like(g)) + 0.001 * g * g
            step_of = (m[name] / (1 - 0.9 ** (step + 1))) / (
                (v[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            )
            W[name] = W[name] - rate * up(name, step_of)
    return W


@pytest.mark.parametrize(("method", "side"), [("flora", "out_features"), ("galore", "in_features")])
def test_the_optimizer_remembers_a_compressed_gradient_only(method, side):
    run = training({"method": method, "r": 4}, {"max_steps": 2})
    list(loop.train_steps(run))
    sizes = [t.numel() for state in run.optimizer.state.values() for t in state.values() if t.ndim]
    assert sorted(sizes) == sorted(2 * [spec.r * getattr(spec, side) for spec in run.adapter.plan.layers])


# ---- galore -------------------------------------------------------------------------------------------------------


def check_leading(run: loop.Training, G: dict[str, Tensor]) -> None:
    """BᵀB = I, and no other B of this rank keeps more of the gradient."""
    for name, delta in run.adapter.deltas.items():
        B = delta.get_parameter("B").detach().double()
        torch.testing.assert_close(B.t() @ B, torch.eye(B.shape[1]).double(), rtol=0, atol=1e-5)
        most = torch.linalg.svdvals(G[name])[: B.shape[1]].square().sum()
        assert (B.t() @ G[name]).square().sum() >= (1 - 1e-4) * most, name


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_galore_projects_on_the_leading_directions_of_the_gradient_at_every_start(kind):
    """After a restart: of the gradient where training goes on, on the rows of the next step."""
    lifecycle = {"restart": {"every": 3, "moments": 1.0}}
    run = training(
        {"method": "galore", "r": 4, "lifecycle": lifecycle},
        {"learning_rate": 3e-2, "max_steps": 8},
        kind=kind,
        seed=seed(),
    )
    model = plain(run)
    check_leading(run, gradients(run, model, 0))
    for report in loop.train_steps(run):
        if report.step in (3, 6):
            write(run, model, weights(run))
            check_leading(run, gradients(run, model, report.step))


def test_the_first_step_of_galore_is_a_quarter_of_adam_on_the_projected_gradient():
    rate = 1e-2
    run = training(
        {"method": "galore", "r": 4},
        {"learning_rate": rate, "lr_scheduler": "constant", "max_steps": 1},
        seed=seed(),
    )
    G, W0 = gradients(run, plain(run), 0), originals(run)
    list(loop.train_steps(run))
    for name, W in weights(run).items():
        P = run.adapter.deltas[name].get_parameter("B").detach().double()
        projected = 0.25 * P.t() @ G[name]  # Adam divides the factor out, but for its epsilon
        expected = -rate * 0.25 * P @ (projected / (projected.abs() + 1e-8))
        # Adam enlarges what rounding makes of a gradient near zero.
        assert distance(W - W0[name], expected) <= 5e-2, name


def test_galore_of_full_rank_is_adam_in_a_rotated_basis():
    """Of layers that are at least as wide as high: the projection is from the left. Float64, by hand.

    Of more tokens than inputs, so that no direction of the gradient is noise, which Adam would blow up.
    """
    rate = 1e-2
    run = training(
        {
            "method": "galore",
            "r": 32,
            "rank_pattern": {"k_proj|v_proj": 16},
            "exclude_modules": ("gate_proj", "up_proj"),
        },
        {"learning_rate": rate, "lr_scheduler": "constant", "max_steps": 5, "batch_size": 12},
        seed=seed(),
    )
    U = {
        name: delta.get_parameter("B").detach().double().clone() for name, delta in run.adapter.deltas.items()
    }
    for basis in U.values():
        torch.testing.assert_close(basis @ basis.t(), torch.eye(len(basis)).double(), rtol=0, atol=1e-5)
    expected = by_hand(run, rate, lambda name, G: 0.25 * U[name].t() @ G, lambda name, Z: 0.25 * U[name] @ Z)
    W0 = originals(run)
    list(loop.train_steps(run))
    for name, W in weights(run).items():
        assert distance(W - W0[name], expected[name] - W0[name]) <= 5e-2, name
