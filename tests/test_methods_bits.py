"""Bits by layer: NormalFloat by its definition, the best assignment within the budget, and the same one ever after."""

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_cli import model as models
from lora_cli.adapter import bits, inject
from lora_cli.adapter import plan as plans
from lora_cli.adapter.allot import cheapest
from lora_cli.adapter.plan import view_of
from lora_cli.adapter.quantised import Quantised
from lora_cli.errors import UserError
from lora_cli.methods.base import nf
from lora_cli.parts import Part
from lora_cli.presets import Method
from lora_cli.recipe.load import Loaded
from lora_cli.recipe.schema import AdapterRecipe, Recipe
from lora_cli.run.check import check
from lora_cli.run.evaluate import evaluate
from lora_cli.run.open import open_model
from lora_cli.run.train import train
from lora_cli.screen import Screen
from tests import tiny
from tests.test_methods_quantised import logits_of, plain_layer, recipe  # noqa: F401 (a fixture)

SCREEN = Screen()
SHAPES = [(96, 128), (50, 34), (7, 1000), (5, 7), (4, 1), (300, 200)]
FORMATS = pytest.mark.parametrize("format", nf.FORMATS, ids=lambda each: f"{each['bits']}-{each['block']}")


@pytest.fixture(autouse=True)
def _other_numbers_in_every_session():
    torch.manual_seed(random.getrandbits(48))


def quantised(layer: nn.Module, **format: int) -> nf.Layer:
    base = view_of(layer)[1]
    return nf.quantise(base, base.weight(), **format)


# ---- NormalFloat --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_levels_are_the_quantiles_of_the_definition(count):
    """LQ-LoRA, 2.2: 2^(b-1) shares from δ to 1/2, 2^(b-1) + 1 from there to 1 − δ, through Φ⁻¹, ends at ±1."""
    delta, half = (1 / 30 + 1 / 32) / 2, 2 ** (count - 1)
    below = torch.linspace(delta, 0.5, half, dtype=torch.float64)
    above = torch.linspace(0.5, 1 - delta, half + 1, dtype=torch.float64)
    quantiles = torch.special.ndtri(torch.cat([below[:-1], above]))
    expected = quantiles / quantiles[-1]
    found = nf.levels(count)
    assert found.dtype is torch.float32
    assert len(found) == 2**count
    torch.testing.assert_close(found.double(), expected, rtol=2**-23, atol=1e-9)
    assert found[half - 1] == 0
    assert found[0] == -1
    assert found[-1] == 1


def test_levels_of_four_bits_are_those_of_bitsandbytes():
    from bitsandbytes import functional

    theirs = functional.get_4bit_type("nf4", device="cpu")
    torch.testing.assert_close(nf.levels(4), theirs, rtol=0, atol=3e-7)  # theirs come from float32 shares


@pytest.mark.parametrize("count", [2, 3, 4, 8])
@pytest.mark.parametrize("groups", [1, 2, 125])
def test_packed_codes_are_found_again_and_take_their_bits(count, groups):
    codes = torch.randint(2**count, (8 * groups,), dtype=torch.uint8)
    kept = nf.packed(codes, count)
    assert kept.dtype is torch.uint8
    assert 8 * kept.numel() == count * codes.numel()
    assert torch.equal(nf.unpacked(kept, count), codes)


@FORMATS
@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_is_the_nearest_level_times_the_largest_value_that_is_kept(format, shape):
    layer = plain_layer(*shape, bias=False)
    layer.weight.mul_(torch.rand(shape[0], 1) * 10)
    made, W, block = quantised(layer, **format), layer.weight.double().flatten(), format["block"]
    largest = [each.abs().max() for each in W.split(block)]
    kept, dq = nf._largest(made.above, made.step, made.least).double(), made.dequantised(torch.float32)
    for group in range(0, len(largest), 256):
        over = torch.stack(largest[group : group + 256]) - min(largest)
        off = (kept[group : group + 256] - min(largest) - over).abs()
        assert (off <= over.max() / 510 + 1e-6 * max(largest)).all(), "half a step of 255"
    levels = nf.levels(format["bits"]).double()
    scaled = levels * kept.repeat_interleave(block)[: len(W), None]
    nearest = (scaled - W[:, None]).abs().min(1).values
    torch.testing.assert_close((dq.double().flatten() - W).abs(), nearest, rtol=1e-5, atol=1e-6)


@FORMATS
def test_zeros_and_single_values_survive(format):
    layer = plain_layer(8, 128, bias=False)
    layer.weight.zero_()
    assert not quantised(layer, **format).dequantised(torch.float32).any()
    layer.weight[3] = -0.25
    found = quantised(layer, **format).dequantised(torch.float32)
    torch.testing.assert_close(found, layer.weight, rtol=1e-6, atol=0)


@FORMATS
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_takes_the_bits_that_are_reckoned_with(format, shape):
    made = quantised(plain_layer(*shape, bias=False), **format)
    held = 8 * sum(buffer.nbytes for buffer in made.buffers())
    assert held == nf.bits_of(shape[0] * shape[1], **format)
    assert bits.by_kind(nn.ModuleDict({"x_proj": made})) == {"x_proj": held / (shape[0] * shape[1])}


@FORMATS
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_that_is_predicted_is_that_of_the_layer(format, kind, dtype):
    plain = (nn.Linear(70, 40) if kind is nn.Linear else Conv1D(40, 70)).to(dtype).requires_grad_(False)
    base, part = view_of(plain)[1], Part("nf", format)
    W = base.weight()
    made = nf.quantise(base, W, **format)
    off = (view_of(made)[1].weight() - W).double()
    assert bits.error(base, W, part, None) == pytest.approx(off.square().sum().item(), rel=1e-9)
    F = torch.rand(40, 1) * torch.rand(70)
    counts = torch.cat([F.mean(1), F.mean(0)])
    weighted = (F.double() * off.square()).sum().item()
    assert bits.error(base, W, part, counts) == pytest.approx(weighted, rel=1e-5)
    assert bits.error(base, W, part, torch.zeros(110)) == 0


# ---- the integer programme ----------------------------------------------------------------------------------------


def problem(count: int, choices: int, kind: str) -> tuple[list[list[float]], list[list[int]]]:
    """Random ones, such in which many are equal, and such in which more bits cost less, as in a model."""
    draw = np.random.default_rng(random.getrandbits(32))
    if kind == "ties":
        return draw.integers(0, 5, (count, choices)).astype(float).tolist(), draw.integers(
            1, 6, (count, choices)
        ).tolist()
    size = draw.integers(1, 30, (count, choices))
    if kind == "random":
        return draw.random((count, choices)).tolist(), size.tolist()
    size = np.sort(size, 1)
    cost = draw.lognormal(0, 2, (count, 1)) * 4.0 ** (-size / 5) * draw.uniform(0.9, 1.1, size.shape)
    return cost.tolist(), size.tolist()


def total(table: list[list[Any]], chosen: Any) -> Any:
    return sum(row[choice] for row, choice in zip(table, chosen, strict=True))


@pytest.mark.parametrize("kind", ["random", "ties", "model"])
def test_an_assignment_is_the_best_of_all(kind):
    for _ in range(100):
        count, choices = random.randint(1, 5), random.randint(1, 5)
        costs, sizes = problem(count, choices, kind)
        budget = random.randint(sum(map(min, sizes)), sum(map(max, sizes)) + 2)
        found = cheapest(costs, sizes, budget)
        assert total(sizes, found) <= budget
        every = itertools.product(range(choices), repeat=count)
        best = min(total(costs, each) for each in every if total(sizes, each) <= budget)
        assert total(costs, found) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("kind", ["random", "ties", "model"])
def test_an_assignment_of_many_is_as_good_as_that_of_a_table_over_all_budgets(kind):
    """Bellman's table: the least cost of the first layers for every number of bits."""
    costs, sizes = problem(60, 8, kind)
    budget = random.randint(sum(map(min, sizes)), sum(map(max, sizes)))
    table = np.zeros(budget + 1)
    for cost, size in zip(costs, sizes, strict=True):
        ways = np.full((len(size), budget + 1), np.inf)
        for way, each, taken in zip(ways, cost, size, strict=True):
            way[taken:] = table[: budget + 1 - taken] + each
        table = ways.min(0)
    found = cheapest(costs, sizes, budget)
    assert total(sizes, found) <= budget
    assert total(costs, found) == pytest.approx(table[budget], rel=1e-9)


def test_more_budget_never_costs_more():
    costs, sizes = problem(80, 12, "model")
    low, high = sum(map(min, sizes)), sum(map(max, sizes))
    found = [total(costs, cheapest(costs, sizes, int(budget))) for budget in np.linspace(low, high, 40)]
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(found))
    assert found[-1] == pytest.approx(sum(map(min, costs)))


def test_what_does_not_fit_at_all_is_an_error():
    with pytest.raises(ValueError, match="more than the budget"):
        cheapest([[1.0, 2.0]], [[5, 4]], 3)


# ---- layers ---------------------------------------------------------------------------------------------------------


def two_layers(
    first: Tensor,
    second: Tensor,
    init: str = "kaiming",
    r: int = 1,
    adapted: int = 2,
    measured: dict[str, Tensor] | None = None,
) -> dict[str, dict[str, int]]:
    """Name -> format of two layers of the same shape, for which there are as many bits as for one of 8 and one of 2."""
    model = nn.Module()
    for name, W in (("first", first), ("second", second)):
        layer = plain_layer(*W.shape, bias=False)
        layer.weight.copy_(W)
        model.add_module(name, layer)
    out, inputs = first.shape
    spec = plans.LayerSpec("first", "linear", inputs, out, r, 1.0, 1.0, 0)
    specs = (spec, plans.replace(spec, name="second"))[:adapted]
    method = Method(name="x", base=Part("nf"), init=Part(init))
    budget = (nf.bits_of(first.numel(), 8, 64) + nf.bits_of(first.numel(), 2, 64)) / (2 * first.numel())
    formats = {"first": Part("nf"), "second": Part("nf")}
    plan = plans.Plan(method, specs, quantised=formats, budget=budget)
    statistics = {spec.name: torch.eye(inputs) for spec in specs} | (measured or {})
    adapter = inject.inject(model, plan, 0, statistics)
    assert adapter.plan.budget is None
    for name in formats:
        made: Any = adapter.layers[name].base_layer if name in adapter.layers else model.get_submodule(name)
        assert {"bits": made.bits, "block": made.block} == adapter.plan.quantised[name].settings
    return {name: part.settings for name, part in adapter.plan.quantised.items()}


def test_the_layer_whose_error_would_be_larger_has_more_bits():
    W = torch.randn(64, 128)
    found = two_layers(100 * W, W)
    assert found["first"]["bits"] == 8
    assert found["second"]["bits"] == 2
    assert two_layers(W, 100 * W) == {"first": found["second"], "second": found["first"]}


@pytest.mark.parametrize("adapted", [1, 2])
def test_with_fisher_weights_it_is_the_layer_whose_error_is_felt(adapted):
    """The first one's weights are ten times as large; a weight of the second one counts a million times as much."""
    W = torch.randn(64, 128)
    light, heavy = torch.full((192,), 1e-3), torch.full((192,), 1e3)
    felt = {"first": light, "second": heavy}
    found = two_layers(10 * W, W, "lq_fisher", adapted=adapted, measured=felt)
    assert (found["first"]["bits"], found["second"]["bits"]) == (2, 8)
    found = two_layers(10 * W, W, "lq_fisher", adapted=adapted, measured=felt | {"first": heavy})
    assert (found["first"]["bits"], found["second"]["bits"]) == (8, 2)


@pytest.mark.parametrize(
    ("init", "takes_off"),
    [
        ("kaiming", False),
        ("loftq", False),
        ("lqer", False),
        ("pissa", True),
        ("lq", True),
        ("lq_fisher", True),
    ],
)
def test_of_a_start_that_takes_something_off_what_is_left_is_counted(init, takes_off):
    """Of the first layer almost all is of rank one; the rest of it is less than the second."""
    thin = 30 * torch.randn(64, 1) @ torch.randn(1, 128)
    measured = {name: torch.ones(192) for name in ("first", "second")} if init == "lq_fisher" else {}
    found = two_layers(thin + 0.01 * torch.randn(64, 128), torch.randn(64, 128), init, measured=measured)
    assert (found["first"]["bits"], found["second"]["bits"]) == ((2, 8) if takes_off else (8, 2))


def errors_of(model: nn.Module, weights: dict[str, Tensor]) -> float:
    found = {name: module for name, module in model.named_modules() if isinstance(module, Quantised)}
    assert found.keys() == weights.keys()
    return sum(
        (layer.dequantised(torch.float32) - weights[name]).double().square().sum().item()
        for name, layer in found.items()
    )


def put(kind: str, dtype: torch.dtype, state: Any, **how: Any) -> tuple[nn.Module, dict[str, Tensor], Any]:
    """A quantised model with these weights, W0 of the quantised layers, and its plan."""
    model = tiny.model(kind).to(dtype)
    model.load_state_dict(state)
    plan = plans.make(AdapterRecipe(r=4), model, models.ends_of(model), quantize="nf", **how)
    weights = {name: view_of(model.get_submodule(name))[1].weight() for name in plan.quantised}
    adapter = inject.inject(model, plan)
    adapter.deactivate()
    return model, weights, adapter.plan


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_keeps_to_its_budget_and_no_uniform_format_within_it_is_better(kind, dtype):
    model = tiny.model(kind)
    for p in model.parameters():
        p.detach().mul_(random.choice((0.2, 1.0, 3.0)))
    state = model.to(dtype).state_dict()
    numbers, before = 0, float("inf")
    uniform: list[tuple[float, float]] = []
    for format in nf.FORMATS:
        layers = {n: view_of(m)[1] for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
        layers = {name: base for name, base in layers.items() if "head" not in name}
        numbers = sum(base.weight().numel() for base in layers.values())
        size = sum(nf.bits_of(base.weight().numel(), **format) for base in layers.values())
        off = sum(bits.error(base, base.weight(), Part("nf", format), None) for base in layers.values())
        uniform.append((size / numbers, off))
    for budget in (2.4, 3.2, 4.2, 9.0):
        made, weights, plan = put(kind, dtype, state, bits=budget)
        assert plan.budget is None
        held = sum(b.nbytes for m in made.modules() if isinstance(m, Quantised) for b in m.kept().values())
        assert 8 * held <= budget * numbers
        found = errors_of(made, weights)
        assert found <= before * (1 + 1e-9)
        assert all(found <= off * (1 + 1e-9) for size, off in uniform if size <= budget)
        before = found


def test_without_a_budget_every_layer_has_four_bits_in_blocks_of_64():
    model, _, plan = put("llama", torch.float32, tiny.model().state_dict())
    layers: list[Any] = [module for module in model.modules() if isinstance(module, Quantised)]
    assert {(layer.bits, layer.block) for layer in layers} == {(4, 64)}
    assert all(not part.settings for part in plan.quantised.values())


# ---- runs -----------------------------------------------------------------------------------------------------------

BY_LAYER = {"method": "lq_lora", "model": {"quantize": "nf", "bits": 3.0}}


def never(*args: Any) -> Any:
    raise AssertionError("looked for again")


def test_an_adapter_says_what_its_layers_were_kept_in_and_nobody_looks_for_it_again(
    recipe: Callable[..., Recipe],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
):
    folder = train(recipe(**BY_LAYER), SCREEN)
    live = logits_of(folder)
    ours = json.loads((folder / "lora.json").read_text())
    assert len({str(each) for each in ours["formats"].values()}) > 1
    monkeypatch.setattr(bits, "allotted", never)
    monkeypatch.setattr(bits, "error", never)
    assert torch.equal(logits_of(folder), live)
    first = next(iter(ours["formats"]))
    for wrong in ({"bits": 5, "block": 64}, {"bits": 3}, {"bits": 4, "block": 64, "more": 1}, None):
        kept = {name: each for name, each in (ours["formats"] | {first: wrong}).items() if each is not None}
        (folder / "lora.json").write_text(json.dumps(ours | {"formats": kept}))
        with pytest.raises(UserError, match=f"no format for {first}"):
            open_model([folder])
    (folder / "lora.json").write_text(json.dumps(ours | {"formats": {}}))
    with pytest.raises(UserError, match="other codes"):
        open_model([folder])


def test_adapters_of_other_budgets_are_not_on_one_base(recipe: Callable[..., Recipe]):  # noqa: F811
    how = {"method": "qlora", "init": "kaiming"}
    first, second, third = (
        train(recipe(name, **how, model={"quantize": "nf", "bits": number}), SCREEN)
        for name, number in (("a", 3.0), ("b", 3.0), ("c", 5.0))
    )
    alone = logits_of(second)
    opened = open_model([first, second])
    opened.use("b")
    with torch.no_grad():
        assert torch.equal(opened.language.model(torch.arange(5, 60)[None]).logits, alone)
    with pytest.raises(UserError, match="quantised in different ways"):
        open_model([first, third])


def test_a_plain_model_is_measured_in_as_many_bits(
    recipe: Callable[..., Recipe],  # noqa: F811
    tiny_folder: Path,
    tmp_path: Path,
):
    folder = train(recipe(method="qlora", model={"quantize": "nf", "bits": 3.0}), SCREEN)
    written = tmp_path / "asked.yaml"
    written.write_text((folder / "recipe.yaml").read_text())
    expected = evaluate(folder, None, [], SCREEN)["base"]["loss"]
    assert evaluate(tiny_folder, written, [], SCREEN)["base"]["loss"] == pytest.approx(expected, rel=1e-6)
    other = evaluate(tiny_folder, written, ["model.bits=8"], SCREEN)
    assert other["base"]["loss"] != pytest.approx(expected, rel=1e-6)


def test_training_says_how_many_bits_each_kind_of_layer_has(
    recipe: Callable[..., Recipe],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
):
    train(recipe(**BY_LAYER), SCREEN)
    said = capsys.readouterr().err.replace("\n", " ")
    assert "14 layers in nf (bits a weight: q_proj " in said


def test_too_few_bits_are_refused_before_anything_is_loaded_and_check_says_how_many(
    recipe: Callable[..., Recipe],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
):
    few = recipe(model={"quantize": "nf", "bits": 2.127})
    with pytest.raises(UserError, match=r"the 14 layers take 2\.1\d+ bits a weight at least") as caught:
        check(Loaded(few, {}, "x"), SCREEN, 0)
    assert caught.value.where == "model.bits: 2.127"
    with pytest.raises(UserError, match="bits a weight at least"):
        open_model([Path(few.model.name)], quantize="nf", bits=2.127)
    check(Loaded(recipe(**BY_LAYER), {}, "x"), SCREEN, 0)
    said = capsys.readouterr().err.replace("\n", " ")
    assert "14 linear layers are kept in nf, in 3 bits a weight" in said
