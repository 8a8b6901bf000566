"""Every part on every axis keeps its axis' law, over Linear, Conv1D and Embedding, in float32 and bfloat16.

A new part is a new file; these tests find it by themselves.
"""

import copy
import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_cli import parts
from lora_cli.adapter import rules
from lora_cli.adapter.base import Base
from lora_cli.adapter.delta import Delta, Place, Shared
from lora_cli.adapter.layer import Adapted
from lora_cli.adapter.plan import view_of
from lora_cli.adapter.seed import generator_of
from lora_cli.adapter.start import Start
from lora_cli.attention import train_with
from lora_cli.errors import UserError
from lora_cli.methods.base.expert import ExpertLinear
from lora_cli.parts import Part
from lora_cli.presets import PRESETS, Method, resolve, with_defaults
from lora_cli.recipe.schema import AdapterRecipe, TrainRecipe
from tests import tiny

IN, OUT, R = 12, 20, 4
LAYER = "blocks.0.layer"
SMALL: dict[str, dict[str, Any]] = {
    "loretta": {"bond": 3},
    "nola": {"bases": 8},
    "vb_lora": {"vectors": 6, "length": 2},
}
"""Settings of deltas whose own are for larger layers."""
KINDS = ("linear", "conv1d", "embedding", "conv2d", "conv3d", "expert")
BASES = {"conv2d": "convolution", "conv3d": "convolution"}
"""Kinds of layers that one file is for."""
DTYPES = (torch.float32, torch.bfloat16)
ALL = [name for name in parts.names("delta") if name not in ("whole", "none")]
DELTAS = [name for name in ALL if rules.MERGEABLE in rules.of_part("delta", name)]
TOGETHER = [
    name for name in ALL if name not in DELTAS and not hasattr(parts.load("delta", name).make, "expert")
]
"""What is computed by several layers, or of whole documents, has tests of its own."""
ROUTED = [name for name in ALL if name not in (*DELTAS, *TOGETHER)]
LAYERS = list(itertools.product(KINDS, DTYPES))


def module_of(kind: str, dtype: torch.dtype) -> nn.Module:
    """A random frozen layer that maps IN to OUT; of the convolutions IN is 3 channels times 4 places."""
    made = {
        "linear": lambda: nn.Linear(IN, OUT),
        "conv1d": lambda: Conv1D(OUT, IN),
        "embedding": lambda: nn.Embedding(IN, OUT),
        "expert": lambda: ExpertLinear(torch.randn(IN, OUT).t() / 3, torch.randn(OUT)),
        "conv2d": lambda: nn.Conv2d(3, OUT, (1, 4), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        "conv3d": lambda: nn.Conv3d(3, OUT, (2, 1, 2), padding=(0, 1, 0), padding_mode="replicate"),
    }[kind]()
    if kind == "conv1d":
        nn.init.normal_(made.bias)
    return made.to(dtype).requires_grad_(False)


def base_of(kind: str, dtype: torch.dtype) -> Base:
    view = view_of(module_of(kind, dtype))
    assert view is not None
    assert view[0] == BASES.get(kind, kind)
    return view[1]


def input_of(base: Base, dtype: torch.dtype) -> torch.Tensor:
    if base.reads_ids:
        return torch.randint(0, IN, (3, 5))
    shape = (2, 3, *(5, 6, 4)[: -base.channels - 1]) if base.channels != -1 else (3, 5, IN)
    return torch.randn(shape).to(dtype)


def as_vectors(base: Base, x: torch.Tensor) -> torch.Tensor:
    """What x means to a matrix: itself, one-hot ids, or its patches, each entry picked by a kernel of its own."""
    if base.reads_ids:
        return nn.functional.one_hot(x, IN).double()
    if base.channels == -1:
        return x.double()
    picking = copy.deepcopy(base.module).double()
    picking.weight = nn.Parameter(torch.eye(IN).double().view(IN, *base.module.weight.shape[1:]))
    picking.bias = None
    return picking(x.double()).movedim(1, -1)


def delta_of(name: str, base: Base) -> Delta:
    """A delta with every tensor random."""
    delta = new_delta(name, base)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return delta


def new_delta(name: str, base: Base) -> Delta:
    """A delta of an adapter that has this layer only."""
    settings = settings_of(name)
    place = Place(base, R, 0.7, shared=Shared(shared_shapes(name)), name=LAYER)
    delta = parts.load("delta", name).make(place, **settings)
    with torch.no_grad():
        delta.start(torch.Generator().manual_seed(0))
    return delta


def settings_of(name: str) -> dict[str, Any]:
    """Those of a delta that fit a small layer."""
    return parts.settings("delta", Part(name, SMALL.get(name, {})))


def shared_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The tensors that a delta shares with those of other layers."""
    part = parts.load("delta", name)
    if not hasattr(part, "shared_shapes"):
        return {}
    return part.shared_shapes(LAYER, IN, OUT, R, **settings_of(name))


def tolerance(dtype: torch.dtype, size: float = 5.0) -> dict[str, float]:
    """Absolute, in proportion to the largest number."""
    return {"rtol": 0, "atol": size * (4e-6 if dtype is torch.float32 else 0.03)}


def fits(axis: str, name: str, kind: str) -> bool:
    """Whether the part's file takes this kind of base."""
    return f"base.{BASES.get(kind, kind)}" not in rules.stated("forbids", axis, Part(name))


def on_layers(axis: str, names: Iterable[str]) -> pytest.MarkDecorator:
    """Each part on every layer that its file takes; the argument is called as the axis."""
    cases = [(name, *layer) for name in names for layer in LAYERS if fits(axis, name, layer[0])]
    return pytest.mark.parametrize((axis, "kind", "dtype"), cases)


# ---- base ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "dtype"), LAYERS)
def test_base_is_its_weight_and_bias(kind, dtype):
    base = base_of(kind, dtype)
    x = input_of(base, dtype)
    bias = 0 if base.bias is None else base.bias.double()
    expected = as_vectors(base, x) @ base.weight().double().t() + bias
    torch.testing.assert_close(base(x).double(), expected, **tolerance(dtype))
    assert torch.equal(base(x), base.module(x).movedim(base.channels, -1))
    assert base.weight().dtype is torch.float32


@pytest.mark.parametrize(("kind", "dtype"), LAYERS)
def test_base_projects_a_matrix_the_way_it_applies_its_own(kind, dtype):
    base = base_of(kind, dtype)
    x, A = input_of(base, dtype), torch.randn(R, IN).to(dtype)
    torch.testing.assert_close(
        base.project(x, A).double(), as_vectors(base, x) @ A.double().t(), **tolerance(dtype)
    )


@pytest.mark.parametrize(("kind", "dtype"), LAYERS)
def test_replaced_base_holds_exactly_the_new_weight(kind, dtype):
    base = base_of(kind, dtype)
    weight = torch.randn(OUT, IN).to(dtype)
    bias = None if base.bias is None else torch.randn(OUT).to(dtype)
    found = view_of(base.replaced(weight, bias))
    assert found is not None
    assert torch.equal(found[1].weight(), weight.float())
    assert found[1].bias is None if bias is None else torch.equal(found[1].bias, bias)
    assert not torch.equal(base.weight(), weight.float()), "the original is left alone"


# ---- delta and combine -----------------------------------------------------------------------------------------


@on_layers("delta", DELTAS)
def test_delta_adds_its_weight_times_x(delta, kind, dtype):
    base = base_of(kind, dtype)
    made, x = delta_of(delta, base), input_of(base, dtype)
    change = as_vectors(base, x) @ made.weight().double().t()
    y = torch.randn(change.shape).to(dtype)
    shift = made.shift()
    expected = y.double() + change
    expected += 0 if shift is None else shift.double()
    allowed = tolerance(dtype, expected.abs().max().item())
    torch.testing.assert_close(made.add_to(y.clone(), x).double(), expected, **allowed)


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("kind", KINDS)
def test_factors_of_a_delta_multiply_to_its_weight(delta, kind):
    made = delta_of(delta, base_of(kind, torch.float32))
    factors = made.factors()
    if factors is not None:
        torch.testing.assert_close(factors[0] @ factors[1], made.weight())


@on_layers("delta", ROUTED)
def test_delta_adds_what_its_experts_do_by_the_weights_of_its_gates(delta, kind, dtype):
    base = base_of(kind, dtype)
    made, x = delta_of(delta, base), input_of(base, dtype)
    count = len(made.router)
    scores = x.double() @ made.router.detach().to(dtype).double().t()
    gates = made.gates(x).double()
    torch.testing.assert_close(gates.sum(-1), torch.ones(3, 5, dtype=torch.float64), rtol=0, atol=1e-6)
    if made.top is None:
        allowed = 1e-5 if dtype is torch.float32 else 0.1
        torch.testing.assert_close(gates, scores.softmax(-1), rtol=0, atol=allowed)
    y = torch.randn(3, 5, OUT).to(dtype)
    each = torch.stack([x.double() @ made.expert(n).double().t() for n in range(count)], -2)
    expected = y.double() + (gates[..., None] * each).sum(-2)
    allowed = tolerance(dtype, max(5.0, expected.abs().max().item()))
    torch.testing.assert_close(made.add_to(y.clone(), x).double(), expected, **allowed)
    beside = made.beside(base, x, x).double() - base.module(x).double()
    torch.testing.assert_close(beside, expected - y.double(), **allowed)


@on_layers("delta", ROUTED)
def test_a_one_hot_gate_is_that_expert(delta, kind, dtype):
    base = base_of(kind, dtype)
    made, x = delta_of(delta, base), input_of(base, dtype)
    number = int(torch.randint(len(made.router), ()))
    gates = nn.functional.one_hot(torch.tensor(number), len(made.router)).float().expand(3, 5, -1)
    expected = x.double() @ made.expert(number).double().t()
    found = made.mix(torch.zeros(3, 5, OUT, dtype=dtype), x, gates).double()
    torch.testing.assert_close(found, expected, **tolerance(dtype, max(5.0, expected.abs().max().item())))


@pytest.mark.parametrize("delta", ALL)
def test_declared_shapes_are_the_tensors_of_the_delta(delta):
    made = delta_of(delta, base_of("linear", torch.float32))
    part = parts.load("delta", delta)
    shared = {key.rpartition(".")[2]: shape for key, shape in shared_shapes(delta).items()}
    found = {key: tuple(p.shape) for key, p in made.named_parameters()}
    assert part.shapes(IN, OUT, R, **settings_of(delta)) | shared == found
    frozen = {key for key, p in made.named_parameters() if not p.requires_grad}
    assert frozen == getattr(part, "FROZEN", frozenset())


@on_layers("combine", parts.names("combine"))
def test_merged_layer_equals_the_live_one_bias_included(combine, kind, dtype):
    base = base_of(kind, dtype)
    layer: Adapted = parts.load("combine", combine).make(base, delta_of("lowrank", base))
    x = input_of(base, dtype)
    merged = base.replaced(layer.merged_weight(), layer.merged_bias())
    expected = merged(x if base.reads_ids else x.float()).double()
    torch.testing.assert_close(layer(x).double(), expected, **tolerance(dtype, expected.abs().max().item()))


# ---- init, scale, trainable, dropout ------------------------------------------------------------------------------


def goes_with(axis: str, name: str, other: str, chosen: str) -> bool:
    """Whether a part's file lets the part `chosen` of another axis stand beside it."""
    needs = [need.split(" or ") for need in rules.stated("needs", axis, Part(name))]
    asked = [options for options in needs if any(option.startswith(f"{other}.") for option in options)]
    facts = rules.of_part(other, chosen)
    forbidden = rules.stated("forbids", axis, Part(name))
    return all(facts & set(options) for options in asked) and not facts & set(forbidden)


STARTS = [
    (init, delta, kind)
    for init, delta, kind in itertools.product(parts.names("init"), [*DELTAS, *ROUTED], KINDS)
    if goes_with("init", init, "delta", delta)
    and goes_with("delta", delta, "init", init)
    and fits("init", init, kind)
    and fits("delta", delta, kind)
]


def started(init: str, kind: str = "linear", delta: str = "lowrank", seed: int = 7) -> Delta:
    """A delta of the method's first step; what the init asks to be measured is random."""
    torch.manual_seed(0)
    base = base_of(kind, torch.float32)
    begun = new_delta(delta, base)
    part = parts.load("init", init)
    rows = torch.randn(50, IN) * torch.linspace(1, 3, IN)
    statistic = {
        "inputs": rows.t() @ rows / 50,
        "gradients": torch.randn(OUT, IN),
        "fisher": torch.rand(OUT + IN),
        None: None,
    }[getattr(part, "measures", None)]
    with torch.no_grad():
        start = Start(base, generator_of(seed, "layer"), statistic)
        part.init(begun, start, **parts.settings("init", Part(init)))
    return begun


def test_every_init_and_every_delta_stands_in_some_start():
    assert {init for init, _, _ in STARTS} == set(parts.names("init"))
    assert {delta for _, delta, _ in STARTS} == {*DELTAS, *ROUTED}


@pytest.mark.parametrize(("init", "delta", "kind"), STARTS)
def test_init_starts_at_the_base_and_every_factor_moves_within_two_steps(init, delta, kind):
    made = started(init, kind, delta)
    allowed = 1e-2 if hasattr(parts.load("delta", delta), "approximates") else 1e-6
    matrices = [made.weight()] if delta in DELTAS else [made.expert(n) for n in range(len(made.router))]
    assert all(W.norm() <= allowed * base_of(kind, torch.float32).weight().norm() for W in matrices)
    trained = [p for p in made.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    base = base_of(kind, torch.float32)
    x = input_of(base, torch.float32)
    zeros = torch.zeros(*as_vectors(base, x).shape[:-1], OUT)
    for _ in range(2):
        (made.add_to(zeros, x) - torch.randn_like(zeros)).square().sum().backward()
        with torch.no_grad():
            for parameter in trained:
                parameter -= 0.01 * parameter.grad
                parameter.grad = None
    assert all(not torch.equal(p, old) for p, old in zip(trained, before, strict=True))


@pytest.mark.parametrize("init", [init for init, *where in STARTS if where == ["lowrank", "linear"]])
def test_an_init_says_whether_it_takes_off_w0_what_it_adds(init):
    made = started(init)
    asks_for_codes = "base.quantized" in rules.stated("needs", "init", Part(init))
    assert asks_for_codes or (made.fixed_A is not None) == (rules.SHIFTED in rules.of_part("init", init))


@pytest.mark.parametrize(("init", "delta", "kind"), [start for start in STARTS if start[2] == "linear"])
def test_init_depends_on_its_generator_only(init, delta, kind):
    first, second = started(init, kind, delta).state_dict(), started(init, kind, delta).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_only_the_zero_factor_moves_in_the_first_step():
    for init, still in (("kaiming", "A"), ("zero_a", "B")):
        delta = started(init, "linear")
        (delta.add_to(torch.zeros(8, OUT), torch.randn(8, IN)) - 1).square().sum().backward()
        moving = {key for key, p in delta.named_parameters() if torch.count_nonzero(p.grad)}
        assert moving == {"A", "B"} - {still}


def test_orthogonal_rows_are_orthonormal():
    A = started("orthogonal", "linear").A.detach().double()
    torch.testing.assert_close(A @ A.t(), torch.eye(R, dtype=torch.float64), atol=1e-6, rtol=0)


def test_kaiming_is_uniform_in_one_over_root_in():
    base = view_of(nn.Linear(400, 50))[1]
    delta = parts.load("delta", "lowrank").make(Place(base, 64, 1.0))
    parts.load("init", "kaiming").init(delta, Start(base, generator_of(0, "x")))
    assert delta.A.abs().max() <= 400**-0.5
    assert delta.A.std().item() == pytest.approx(400**-0.5 / 3**0.5, rel=0.02)


def test_scales_have_their_closed_form():
    scales = {name: parts.load("scale", name).scale for name in ("alpha_over_r", "rslora")}
    assert parts.load("scale", "constant").scale(3.0, 4, value=0.5) == 0.5
    for alpha, r in ((16.0, 4), (3.0, 9), (1.0, 1)):
        assert scales["alpha_over_r"](alpha, r) == alpha / r
        assert scales["rslora"](alpha, r) == pytest.approx(alpha * r**-0.5)


def test_output_of_rslora_does_not_shrink_with_the_rank():
    ranks, outputs = [4, 16, 64, 256], {"alpha_over_r": [], "rslora": []}
    x = torch.randn(64, 300)
    for r in ranks:
        z = x @ torch.randn(r, 300).t() @ torch.randn(200, r).t()
        for name, seen in outputs.items():
            seen.append((parts.load("scale", name).scale(1.0, r) * z).std().log().item())
    logs = torch.tensor(ranks).log()
    slopes = {
        n: torch.linalg.lstsq(torch.stack([logs, torch.ones(4)], 1), torch.tensor(y)[:, None])[0][0].item()
        for n, y in outputs.items()
    }
    assert slopes["rslora"] == pytest.approx(0, abs=0.05)
    assert slopes["alpha_over_r"] == pytest.approx(-0.5, abs=0.05)


@pytest.mark.parametrize("trainable", parts.names("trainable"))
def test_after_ten_steps_exactly_the_declared_tensors_changed(trainable):
    init, name = {"only_core": ("closed", "core")}.get(trainable, ("symmetric", "lowrank"))
    delta = started(init, "linear", name)
    trains = parts.load("trainable", trainable).trains
    for key, parameter in delta.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and trains(key))
    before = {key: value.clone() for key, value in delta.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in delta.parameters() if p.requires_grad], lr=0.1)
    for _ in range(10):
        (delta.add_to(torch.zeros(8, OUT), torch.randn(8, IN)) - 1).square().sum().backward()
        optimizer.step()
    changed = {key for key, value in delta.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if trains(key) and not key.startswith("fixed")}
    assert changed


@pytest.mark.parametrize("dropout", parts.names("dropout"))
def test_dropout_keeps_the_mean_and_rests_in_eval(dropout):
    made = parts.load("dropout", dropout).make(p=0.3)
    x = torch.randn(200, 500)
    torch.testing.assert_close(
        made(x).sum(), x.sum(), rtol=0, atol=6 * (x.square().sum() * 0.3 / 0.7).sqrt().item()
    )
    assert torch.equal(made.eval()(x), x)
    assert parts.load("dropout", dropout).make(p=0.0) is None


# ---- optimizer ------------------------------------------------------------------------------------------------------


def test_adamw_step_is_the_closed_form():
    train = TrainRecipe(learning_rate=0.01, betas=(0.8, 0.95))
    w = nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    optimizer = parts.load("optimizer", "adamw").make(
        [{"params": [w], "names": ["w"], "weight_decay": 0.1}], train, None
    )
    m = v = torch.zeros_like(w)
    expected = w.detach().clone()
    for step in range(1, 5):
        g = torch.randn_like(w)
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * (m / (1 - 0.8**step)) / (
            (v / (1 - 0.95**step)).sqrt() + 1e-8
        )
        w.grad = g
        optimizer.step()
    torch.testing.assert_close(w.detach(), expected)


# ---- the registry and its rules ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("axis", "name"), [(a, n) for a in parts.AXES for n in parts.names(a)])
def test_part_has_a_one_line_summary_that_starts_with_its_name(axis, name):
    assert parts.summary(axis, name).startswith(f"{name}: ")
    parts.load(axis, name)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_names_parts_that_exist_and_go_together(name):
    method = resolve(AdapterRecipe(method=name))
    assert all(part.name in parts.names(axis) for axis, found in method.chosen().items() for part in found)
    rules.check(method, rules.facts_of(method, with_defaults(AdapterRecipe(method=name))))


def test_an_axis_named_in_the_recipe_wins_over_the_preset():
    assert resolve(AdapterRecipe(method="rslora", scale="alpha_over_r")).scale.name == "alpha_over_r"
    assert resolve(AdapterRecipe(method="rslora")).scale.name == "rslora"


def test_a_frozen_zero_factor_is_refused_with_the_reason():
    method = Method(name="lora", trainable=parts.Part("lora_fa"), init=parts.Part("zero_a"))
    with pytest.raises(UserError, match="A would stay zero for ever"):
        rules.check(method, rules.facts_of(method))


# ---- attention ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("attention", parts.names("attention"))
def test_outside_of_training_a_token_sees_what_the_model_lets_it(attention, model):
    made, ids = tiny.model(model).eval(), torch.randint(5, tiny.VOCABULARY, (2, 24))
    with torch.no_grad():
        before = made(ids).logits
        train_with(made, Part(attention))
        inside = made.train()(ids).logits
        assert torch.allclose(made.eval()(ids).logits, before, atol=1e-6)
    assert torch.allclose(inside, before, atol=1e-6) == (attention == "full" and model == "llama")
