"""A base in few bits: the codes are bitsandbytes', gradients are exact, and every command makes the same base again."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from lora_cli import model as models
from lora_cli import parts
from lora_cli.adapter import inject
from lora_cli.adapter import plan as plans
from lora_cli.adapter.delta import LowRank, Place
from lora_cli.adapter.plan import view_of
from lora_cli.adapter.quantised import Quantised, View, digest, remainder
from lora_cli.adapter.start import thin
from lora_cli.errors import ExitCode, UserError
from lora_cli.parts import Part
from lora_cli.presets import Method
from lora_cli.recipe.load import Loaded
from lora_cli.recipe.schema import AdapterRecipe, Recipe
from lora_cli.run import probe
from lora_cli.run.check import check
from lora_cli.run.evaluate import evaluate
from lora_cli.run.export import export
from lora_cli.run.merge import merge
from lora_cli.run.open import open_model
from lora_cli.run.train import train
from lora_cli.screen import Screen
from tests import tiny
from tests.adapters import ids
from tests.test_train_run import stopped_after
from tests.training import kept_in_the_shape_of_w

FORMATS = ("nf4", "nf", "int4", "int8")
SCREEN = Screen()
TAKING = ("pissa", "lq", "lq_fisher", "symmetric", "loftq")
"""Starts that take something off W0 before it is quantised."""


def plain_layer(out: int = 96, inputs: int = 128, bias: bool = True) -> nn.Linear:
    return nn.Linear(inputs, out, bias=bias).requires_grad_(False)


def quantised(format: str, layer: nn.Linear) -> Quantised:
    view = view_of(layer)[1]
    return parts.load("base", format).quantise(view, view.weight())


# ---- the formats ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(96, 128), (50, 34), (7, 1000), (48, 32), (64, 96), (5, 7)])
def test_nf4_has_the_codes_and_largest_values_of_bitsandbytes(shape):
    from bitsandbytes import functional

    layer = plain_layer(*shape)
    ours = quantised("nf4", layer)
    codes, state = functional.quantize_4bit(layer.weight, quant_type="nf4", compress_statistics=True)
    assert torch.equal(ours.codes[: codes.numel()], codes.flatten())
    torch.testing.assert_close(ours.offset, state.offset, rtol=2**-21, atol=0)  # theirs is a float32 sum
    assert torch.equal(ours.absmax, state.absmax)
    torch.testing.assert_close(ours.nested_absmax, state.state2.absmax, rtol=0, atol=1e-7)
    levels = functional.get_4bit_type("nf4", device="cpu")
    largest = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    # by hand: what bitsandbytes 0.50 makes of them on a CPU is wrong where a row does not end with a block
    indices = (
        torch.stack([codes.flatten() >> 4, codes.flatten() & 15], 1).flatten()[: layer.weight.numel()].long()
    )
    expected = levels[indices] * largest.repeat_interleave(64)[: len(indices)]
    torch.testing.assert_close(ours.dequantised(torch.float32), expected.view(shape), rtol=1e-6, atol=1e-8)
    assert (expected.view(shape) - layer.weight).norm() < 0.13 * layer.weight.norm()


def test_int8_has_the_codes_and_largest_values_of_bitsandbytes():
    from bitsandbytes import functional

    layer = plain_layer()
    ours = quantised("int8", layer)
    codes, absmax, _ = functional.int8_vectorwise_quant(layer.weight.detach())
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.absmax, absmax)


def test_nf4_is_off_by_half_the_largest_step_between_its_levels_at_most():
    layer = plain_layer()
    W, dq = layer.weight, quantised("nf4", layer).dequantised(torch.float32)
    largest = W.view(-1, 64).abs().amax(1, keepdim=True)
    # the largest values are themselves rounded: to 8 bits of what is left after their mean
    slack = 0.02 * (largest - largest.mean()).abs().max()
    step = (1.0 - 0.6961928009986877) / 2
    assert ((dq - W).view(-1, 64).abs() <= step * largest + slack).all()
    assert 0.05 < (dq - W).norm() / W.norm() < 0.12


def test_int8_is_off_by_half_a_step_of_its_row_at_most():
    layer = plain_layer()
    layer.weight[3] = 0.0
    W, dq = layer.weight, quantised("int8", layer).dequantised(torch.float32)
    assert ((dq - W).abs() <= W.abs().amax(1, keepdim=True) * (1 / 254 + 1e-6)).all()


@pytest.mark.parametrize("shape", [(96, 128), (50, 34), (7, 33), (5, 7), (4, 1)])
def test_int4_is_off_by_half_a_step_of_its_group_at_most_and_its_least_weight_is_exact(shape):
    layer = plain_layer(*shape)
    layer.weight[2] = 0.25
    layer.weight[3] += 40.0
    W, made = layer.weight, quantised("int4", layer)
    dq, of_group = made.dequantised(torch.float32), torch.arange(shape[1]) // 32
    assert dq.shape == W.shape
    step = (
        torch.stack([W[:, of_group == n].amax(1) - W[:, of_group == n].amin(1) for n in of_group.unique()], 1)
        / 15
    )
    # steps are kept in bfloat16, so the largest weight of a group may be off by 15 times a 512th of one more
    rounding = 2**-23 * W.abs()
    assert ((dq - W).abs() <= (0.5 + 15 / 512) * step[:, of_group] + rounding).all()
    for n in of_group.unique():
        least = W[:, of_group == n].min(1)
        assert torch.equal(dq[:, of_group == n].gather(1, least.indices[:, None])[:, 0], least.values)
        assert torch.equal(made.zero[:, n], least.values)
    assert torch.equal(dq[2], W[2]), "a group that is all the same is exact"


def test_int4_is_scale_times_code_and_a_zero_point():
    layer = plain_layer(6, 70, bias=False)
    made = quantised("int4", layer)
    codes = torch.stack([made.codes >> 4, made.codes & 15], -1).flatten(1)
    assert made.codes.dtype is torch.uint8
    assert codes.shape == (6, 96)
    of_group = torch.arange(70) // 32
    expected = codes[:, :70].double() * made.scale.double()[:, of_group] + made.zero.double()[:, of_group]
    assert torch.equal(made.dequantised(torch.float32), expected.float())
    whole = codes.view(6, 3, 32)
    assert torch.equal(whole.amin(2), torch.zeros(6, 3, dtype=torch.uint8))
    assert torch.equal(whole.amax(2), torch.full((6, 3), 15, dtype=torch.uint8))


@pytest.mark.parametrize("size", [0.0, 0.02, 0.5])
def test_int4_made_again_of_what_moved_by_groups_has_the_same_codes_and_scales(size):
    layer = plain_layer(40, 80, bias=False)
    first = quantised("int4", layer)
    change = size * torch.randn(40, 3)
    again = plain_layer(40, 80, bias=False)
    again.weight.copy_(first.dequantised(torch.float32) + change[:, torch.arange(80) // 32])
    second = quantised("int4", again)
    assert torch.equal(second.codes, first.codes)
    assert torch.equal(second.scale, first.scale)
    assert torch.equal(second.zero, first.zero + change), "all of the change is in the zero points"
    torch.testing.assert_close(second.dequantised(torch.float32), again.weight, rtol=2**-22, atol=2**-24)


@pytest.mark.parametrize(
    ("format", "bits"),
    [
        ("nf4", 4 + 8 / 64 + 32 / (64 * 256)),
        ("nf", 4 + 8 / 64 + 32 / (64 * 256)),
        ("int4", 4 + (16 + 32) / 32),
        ("int8", 8 + 32 / 512),
    ],
)
def test_a_layer_takes_the_bits_that_its_format_says(format, bits):
    layer = plain_layer(512, 512, bias=False)
    taken = sum(buffer.numel() * buffer.element_size() for buffer in quantised(format, layer).buffers())
    fixed = {"nf4": 256 * 4 + 4, "nf": 4}.get(
        format, 0
    )  # levels of the largest values; their mean, or the least
    assert 8 * (taken - fixed) / 512**2 == pytest.approx(bits)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gradient_through_a_quantised_layer_is_that_through_its_weight(format, dtype):
    layer = quantised(format, plain_layer().to(dtype))
    layer.bias.requires_grad_(True)
    x = torch.randn(3, 5, 128).to(dtype).requires_grad_()
    dY = torch.randn(3, 5, 96).to(dtype)
    W = layer.dequantised(dtype)
    expected = nn.functional.linear(x, W, layer.bias)
    wanted = torch.autograd.grad(expected, (x, layer.bias), dY)
    found = layer(x)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    for ours, theirs in zip(torch.autograd.grad(found, (x, layer.bias), dY), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_under_autocast_a_quantised_layer_computes_in_its_type_both_ways(format):
    layer, x = quantised(format, plain_layer()), torch.randn(5, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype is torch.bfloat16
    (dx,) = torch.autograd.grad(y.sum(), x)
    expected = torch.ones(5, 96, dtype=torch.bfloat16) @ layer.dequantised(torch.bfloat16)
    torch.testing.assert_close(dx, expected.float(), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("format", FORMATS)
def test_what_was_taken_off_cancels_without_being_computed(format):
    plain = plain_layer()
    base, delta = view_of(plain)[1], LowRank(Place(view_of(plain)[1], 4, 0.5))
    for parameter in (delta.A, delta.B):
        nn.init.normal_(parameter, std=0.1)
    delta.subtract_start()
    taken = (delta.fixed_B, delta.fixed_A)
    layer = parts.load("base", format).quantise(base, remainder(base.weight(), taken))
    layer.taken = taken
    nn.init.normal_(delta.A)
    view, x = View(layer), torch.randn(7, 128)
    torch.testing.assert_close(layer(x), x @ view.weight().t() + layer.bias)
    short = delta.beside(view, x, x)
    torch.testing.assert_close(short, delta.add_to(layer(x), x), rtol=1e-4, atol=1e-5)
    counted: list[Tensor] = []
    delta.fixed_A.register_hook(counted.append) if delta.fixed_A.requires_grad else None
    W = layer.dequantised(torch.float32) + 0.5 * delta.B @ delta.A
    torch.testing.assert_close(short, x @ W.t() + layer.bias)
    delta.fix(
        torch.randn(96, 2), torch.randn(2, 128)
    )  # as delta_lora does: now they no longer cancel as a whole
    torch.testing.assert_close(delta.beside(view, x, x), delta.add_to(layer(x), x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["qlora", "qdora"])
def test_nothing_as_large_as_w0_is_kept_for_the_backward_pass(method):
    model = tiny.model()
    adapter = inject.inject(
        model, plans.make(AdapterRecipe(method=method, r=4), model, models.ends_of(model))
    )
    assert kept_in_the_shape_of_w(model, adapter, ids()) == []


def test_what_is_quantised_is_every_linear_layer_but_the_head_and_what_trains_in_full():
    for kind, settings in (("llama", {}), ("gpt2", {}), ("mixtral", {})):
        model = tiny.model(kind)
        recipe = AdapterRecipe(method="qlora", r=4, train_also=("norms",), **settings)
        found = {name: view_of(module) for name, module in model.named_modules() if name}
        linear = {name for name, view in found.items() if view and not view[1].reads_ids}
        inject.inject(model, plans.make(recipe, model, models.ends_of(model))).deactivate()
        left = {name for name, module in model.named_modules() if isinstance(module, Quantised)}
        assert left == linear - {models.ends_of(model).head}
    model = tiny.model()
    recipe = AdapterRecipe(method="qlora", target_modules=("q_proj",), train_also=("layers.0.mlp",))
    inject.inject(model, plans.make(recipe, model, models.ends_of(model)))
    assert type(model.get_submodule("model.layers.0.mlp.up_proj")) is nn.Linear
    assert isinstance(model.get_submodule("model.layers.1.mlp.up_proj"), Quantised)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_that_are_parameters_compute_the_same_and_are_of_types_that_can_be_shared_out(format, dtype):
    """To the bit, and whoever asks what the model is hears the same."""
    model = tiny.model("gpt2").to(dtype).eval()
    recipe = AdapterRecipe(r=4)
    inject.inject(model, plans.make(recipe, model, models.ends_of(model), quantize=format)).deactivate()

    def known() -> tuple[Any, ...]:
        with torch.no_grad():
            logits = model(torch.arange(5, 60)[None]).logits.view(torch.uint8)
        return (
            digest(model),
            models.bytes_of(model),
            models.size_of(model),
            models.stored_as(model),
            logits.tolist(),
        )

    before = known()
    layers = [module for module in model.modules() if isinstance(module, Quantised)]
    for layer in layers:
        layer.codes_as_parameters()
        assert sum(b.numel() for b in layer.kept().values() if not isinstance(b, nn.Parameter)) <= 1
        for p in layer.parameters():
            assert p.is_floating_point()
            assert p.is_contiguous()
            assert not p.requires_grad
        assert View(layer).device == torch.device("cpu")
    assert layers
    assert known() == before


def test_a_model_without_quantised_layers_never_imports_bitsandbytes():
    code = (
        "import sys, lora_cli.run.train, lora_cli.run.merge; from tests.adapters import adapted; adapted('llama');"
        "print('bitsandbytes' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-W", "ignore", "-c", code], text=True).strip() == "False"


# ---- starts -------------------------------------------------------------------------------------------------------


def start_of(init: str, format: str = "nf4", scale: float = 0.5, r: int = 8, **settings: Any):
    """(W0, layer, ΔW) of a layer that is started and quantised as in a run; W0 has a falling spectrum."""
    model = nn.Module()
    model.layer = plain_layer(64, 96)
    model.layer.weight.copy_(torch.randn(64, 64) @ torch.diag(0.9 ** torch.arange(64)) @ torch.randn(64, 96))
    W0 = model.layer.weight.detach().clone()
    x = torch.randn(200, 96) * torch.logspace(-1, 1, 96)
    method = Method(name="x", base=Part(format), init=Part(init, settings))
    spec = plans.LayerSpec("layer", "linear", 96, 64, r, scale * r, scale, 0)
    plan = plans.Plan(method, (spec,), quantised={"layer": Part(format)})
    fisher = torch.cat([torch.logspace(-2, 2, 64), x.square().mean(0)])
    adapter = inject.inject(model, plan, 0, {"layer": fisher if init == "lq_fisher" else x.t() @ x / len(x)})
    return W0, adapter.layers["layer"], x


def error_of(W0: Tensor, layer: Any, sizes: Tensor | float = 1.0) -> float:
    return torch.linalg.norm((layer.merged_weight() - W0) * sizes).item()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("init", "settings"),
    [("loftq", {"iterations": t}) for t in (1, 2, 5)]
    + [("lq", {"iterations": t}) for t in (1, 5)]
    + [("lqer", {}), ("lq_fisher", {"iterations": 3})],
)
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_a_start_that_makes_up_for_quantising_is_closer_to_w0_than_without(init, settings, format, scale):
    W0, layer, x = start_of(init, format, scale, **settings)
    torch.manual_seed(0)
    plain = torch.linalg.norm(quantised_weight(W0, format) - W0).item()
    sizes = x.square().mean(0).sqrt() if init == "lqer" else 1.0
    bound = torch.linalg.norm((quantised_weight(W0, format) - W0) * sizes).item() if init == "lqer" else plain
    assert error_of(W0, layer, sizes) < 0.95 * bound


def quantised_weight(W0: Tensor, format: str) -> Tensor:
    layer = plain_layer(*W0.shape)
    layer.weight.copy_(W0)
    return quantised(format, layer).dequantised(torch.float32)


def test_one_iteration_of_loftq_is_the_best_thin_approximation_of_the_error_of_the_plain_base():
    W0, layer, _ = start_of("loftq", scale=3.0)
    Q = quantised_weight(W0, "nf4")
    assert torch.equal(layer.base.weight(), Q), "one iteration leaves the base that every adapter has"
    assert layer.base.taken is None
    left = (W0 - Q).double()
    U, S, Vt = torch.linalg.svd(left)
    best = U[:, :8] * S[:8] @ Vt[:8]
    torch.testing.assert_close(layer.delta.weight().double(), best, rtol=0, atol=1e-5 * S[0].item())
    torch.testing.assert_close(layer.delta.A.norm() * 3.0**0.5, S[:8].sum().sqrt().float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("init", ["loftq", "lq", "lq_fisher"])
def test_an_iterate_that_is_worse_than_one_before_is_not_kept(init):
    errors = []
    for iterations in range(1, 9):
        torch.manual_seed(5)
        W0, layer, x = start_of(init, iterations=iterations)
        errors.append(error_as_started(W0, layer, fisher_sizes(x) if init == "lq_fisher" else 1.0))
    assert errors == sorted(errors, reverse=True), "more iterations never do worse"
    assert errors[-1] < errors[0]


def fisher_sizes(x: Tensor) -> Tensor:
    """What a weight of `start_of` counts, [out, in]: the root of a factor of its row times one of its column."""
    return torch.logspace(-2, 2, 64).sqrt()[:, None] * x.square().mean(0).sqrt()


def error_as_started(W0: Tensor, layer: Any, sizes: Tensor | float) -> float:
    """‖(W0 − Q − s·B·A)·sizes‖, Q being what the codes say."""
    Q, thin = layer.base_layer.dequantised(torch.float32), layer.delta.scale * layer.delta.B @ layer.delta.A
    return torch.linalg.norm((W0 - Q - thin) * sizes).item()


def test_the_first_thin_part_of_lq_with_fisher_weights_is_the_weighted_svd_of_w0():
    W0, layer, x = start_of("lq_fisher", iterations=1)
    sizes = fisher_sizes(x).double()
    U, S, Vt = torch.linalg.svd(sizes * W0.double(), full_matrices=False)
    found = 0.5 * layer.delta.B.detach().double() @ layer.delta.A.detach().double()
    torch.testing.assert_close(sizes * found, U[:, :8] * S[:8] @ Vt[:8], rtol=0, atol=1e-5 * S[0].item())


def test_lq_with_fisher_weights_is_better_than_lq_where_the_loss_feels_it_and_worse_elsewhere():
    torch.manual_seed(3)
    W0, weighted, x = start_of("lq_fisher")
    torch.manual_seed(3)
    same, plain, _ = start_of("lq")
    assert torch.equal(W0, same)
    sizes = fisher_sizes(x)
    assert error_as_started(W0, weighted, sizes) < 0.9 * error_as_started(W0, plain, sizes)
    assert error_as_started(W0, weighted, 1.0) > error_as_started(W0, plain, 1.0)


def test_the_weighted_thin_part_is_where_no_step_makes_its_error_smaller():
    W, rows, columns = (
        torch.randn(20, 30).double(),
        torch.rand(20, 1).double() + 0.1,
        torch.rand(30).double() + 0.1,
    )
    B, A = (factor.requires_grad_() for factor in thin(W, 4, 0.7, rows, columns))
    error = (rows * (W - 0.7 * B @ A) * columns).square().sum()
    for gradient in torch.autograd.grad(error, (B, A)):
        assert gradient.abs().max() < 1e-9, "it is a critical point"
    S = torch.linalg.svdvals(rows * W * columns)
    assert error.item() == pytest.approx(S[4:].square().sum().item(), rel=1e-9), "and the least of them"
    equal = thin(W, 4, 0.7)
    unweighted = (rows * (W - 0.7 * equal[0] @ equal[1]) * columns).square().sum()
    assert error < 0.95 * unweighted


def test_lqer_is_better_than_loftq_for_the_inputs_it_has_seen():
    torch.manual_seed(3)
    W0, seen, x = start_of("lqer")
    torch.manual_seed(3)
    same, unseen, _ = start_of("loftq")
    assert torch.equal(W0, same)
    sizes = x.square().mean(0).sqrt()
    assert error_of(W0, seen, sizes) < 0.9 * error_of(W0, unseen, sizes)
    assert error_of(W0, seen) > error_of(W0, unseen), "which is the best without the inputs"


@pytest.mark.parametrize("init", ["pissa", "milora", "olora", "symmetric", "lq", "kaiming"])
def test_other_starts_start_as_the_base_that_is_left_without_the_adapter(init):
    _, layer, x = start_of(init)
    assert layer.delta.weight().norm() < 1e-6 * layer.base.weight().norm()
    torch.testing.assert_close(layer(x), layer.base_layer(x), rtol=1e-4, atol=1e-3)
    assert (layer.base.taken is None) == (init == "kaiming")


def test_pissa_on_a_quantised_base_is_closer_to_w0_than_quantising_alone():
    W0, layer, _ = start_of("pissa")
    assert error_of(W0, layer) < 0.8 * torch.linalg.norm(quantised_weight(W0, "nf4") - W0)
    left = W0 - 0.5 * layer.delta.B @ layer.delta.A
    torch.testing.assert_close(layer.base_layer.dequantised(torch.float32), quantised_weight(left, "nf4"))


@pytest.mark.parametrize("init", ["loftq", "lq", "lq_fisher", "lqer"])
def test_what_is_not_quantised_starts_as_lora_does(init):
    lookup = () if init == "lqer" else ("embed_tokens",)

    def deltas(**how: Any) -> dict[str, Any]:
        model = tiny.model()
        recipe = AdapterRecipe(target_modules=("q_proj", "lm_head", *lookup), r=4, **how)
        plan = plans.make(recipe, model, models.ends_of(model), quantize="nf4")
        statistics = {
            spec.name: torch.ones(spec.out_features + spec.in_features)
            if init == "lq_fisher"
            else torch.eye(spec.in_features)
            for spec in plan.layers
        }
        return inject.inject(model, plan, seed=3, statistics=statistics).deltas

    plain, started = deltas(method="qlora"), deltas(init=init)
    assert len(started) == 3 + bool(lookup) == len(plain)
    for name, delta in started.items():
        same = [torch.equal(delta.state_dict()[key], plain[name].state_dict()[key]) for key in ("A", "B")]
        assert same == ([False, False] if name.endswith("q_proj") else [True, True])


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tiny_folder: Path, rows_file: Path, tmp_path: Path):
    """Make a recipe on the tiny model."""

    def make(output: str = "run", model: dict[str, Any] | None = None, **adapter: Any) -> Recipe:
        return Recipe.model_validate(
            {
                "model": {"name": str(tiny_folder), "dtype": "float32", **(model or {})},
                "data": {
                    "train": str(rows_file),
                    "eval_fraction": 0.2,
                    "format": {"prompt": "{question}", "completion": "{answer}"},
                },
                "adapter": {"r": 4, **adapter},
                "train": {"max_steps": 4, "batch_size": 8, "learning_rate": 1e-2, "save_steps": 2},
                "output": {"dir": str(tmp_path / output)},
            }
        )

    return make


def logits_of(folder: Path, **how: Any) -> Tensor:
    with torch.no_grad():
        return open_model([folder], **how).language.model(torch.arange(5, 60)[None]).logits


CASES: dict[str, dict[str, Any]] = {
    "qlora": {"method": "qlora"},
    "qdora": {"method": "qdora"},
    "int8": {"model": {"quantize": "int8"}},
    "int4": {"model": {"quantize": "int4"}},
    "qa_lora": {"method": "qa_lora"},
    "nf": {"model": {"quantize": "nf"}},
    "nf, bits by layer": {"method": "lq_lora", "model": {"quantize": "nf", "bits": 3.0}},
    "nf, bits by layer, fisher": {
        "method": "lq_lora_fisher",
        "model": {"quantize": "nf", "bits": 3.5},
        "target_modules": ("q_proj", "down_proj"),
    },
    "nf, bits by layer, dora": {"method": "qdora", "init": "pissa", "model": {"quantize": "nf", "bits": 4.5}},
    "lq, fisher": {"method": "lq_lora_fisher", "init": {"lq_fisher": {"rows": 8}}},
    "qpissa": {"method": "qlora", "init": "pissa"},
    "qpissa, dora": {"method": "qdora", "init": "pissa"},
    "loftq of its own base": {"method": "loftq", "init": {"loftq": {"iterations": 3}}},
    "delta_lora": {
        "method": "delta_lora",
        "model": {"quantize": "nf4"},
        "lifecycle": {"delta_lora": {"after": 1}},
    },
    "delta_lora, pissa": {
        "method": "delta_lora",
        "init": "pissa",
        "model": {"quantize": "nf4"},
        "lifecycle": {"delta_lora": {"after": 1}},
    },
    "norms, head": {"method": "qlora", "train_also": ("norms", "head")},
    "new rows": {"method": "qlora", "model": {"add_tokens": ("<|think|>",)}},
    "vera": {"method": "vera", "r": 16, "model": {"quantize": "nf4"}},
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_opened_again_and_merged_computes_what_was_trained(recipe, case, tmp_path, monkeypatch):
    from lora_cli.run import save

    trained: list[Any] = []
    keep = save.adapter
    monkeypatch.setattr(
        save, "adapter", lambda folder, run, *more: (trained.append(run), keep(folder, run, *more))
    )
    folder = train(recipe(**CASES[case]), SCREEN)
    (run,) = trained
    with inject.without_adapters(run.adapter):
        assert digest(run.model) == run.adapter.codes is not None
    with torch.no_grad():
        live = run.model.eval()(torch.arange(5, 60)[None]).logits
    assert probe.distance(logits_of(folder), live) < 1e-5
    (again,) = open_model([folder]).adapters.values()
    assert again.codes == run.adapter.codes, "the same codes to the bit"
    report = merge(folder, tmp_path / "merged", None, SCREEN)
    assert report["onto"] == "trained"
    assert report["from_trained"]["trained"]["worst"] == 0, "stored in float32 it is what was trained"
    by_layer = "bits" in CASES[case].get("model", {})
    assert 0.001 < report["from_trained"]["original"]["median"] < (0.6 if by_layer else 0.12)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        again = merged(torch.arange(5, 60)[None]).logits
    assert probe.distance(again, live) < 1e-5


@pytest.mark.parametrize("case", ["qlora", "qdora", "qpissa"])
def test_merged_onto_the_original_weights_it_is_these_and_what_was_learned(recipe, case, tmp_path, capsys):
    folder = train(recipe(**CASES[case]), SCREEN)
    expected = logits_of(folder, original=True)
    capsys.readouterr()
    report = merge(folder, tmp_path / "merged", None, SCREEN, onto="original")
    assert "another model than the one that was trained" in capsys.readouterr().err.replace("\n", " ")
    assert report["onto"] == "original"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        again = merged(torch.arange(5, 60)[None]).logits
    assert probe.distance(again, expected) < 1e-5
    assert probe.distance(again, logits_of(folder)) > 1e-3, "which is not what was trained"


def test_merging_onto_other_weights_needs_other_weights(recipe, tmp_path):
    folder = train(recipe(), SCREEN)
    with pytest.raises(UserError, match="no other weights"):
        merge(folder, tmp_path / "merged", None, SCREEN, onto="original")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    "case",
    [
        *("qdora", "qpissa", "loftq of its own base", "int8", "qa_lora", "lq, fisher"),
        *("nf, bits by layer", "nf, bits by layer, fisher"),
    ],
)
def test_a_run_goes_on_from_a_checkpoint_to_the_bit(recipe, case, monkeypatch):
    whole = train(recipe("whole", **CASES[case]), SCREEN)
    with monkeypatch.context() as patched:
        stopped_after(patched, 3)
        with pytest.raises(UserError, match="stopped after step 3"):
            train(recipe("parts", **CASES[case]), SCREEN)
    again = train(recipe("parts", **CASES[case]), SCREEN, resume=True)
    weights = "adapter_model.safetensors"
    assert (whole / weights).read_bytes() == (again / weights).read_bytes()


def test_a_checkpoint_of_other_codes_is_not_gone_on_from(recipe, monkeypatch):
    with monkeypatch.context() as patched:
        stopped_after(patched, 3)
        with pytest.raises(UserError, match="stopped after step 3"):
            train(recipe(method="qlora"), SCREEN)
    monkeypatch.setattr(inject, "digest", lambda model: "others")
    with pytest.raises(UserError, match="quantised to other codes") as caught:
        train(recipe(method="qlora"), SCREEN, resume=True)
    assert caught.value.code is ExitCode.NO_CHECKPOINT


def test_an_adapter_of_other_codes_is_refused_and_can_be_merged_onto_the_original(recipe, tmp_path):
    folder = train(recipe(method="qlora"), SCREEN)
    ours = json.loads((folder / "lora.json").read_text())
    (folder / "lora.json").write_text(json.dumps(ours | {"codes": "0" * 32}))
    with pytest.raises(UserError, match="quantised to other codes") as caught:
        open_model([folder])
    assert "--onto original" in caught.value.fix
    assert open_model([folder], original=True).adapters


def test_other_weights_are_refused_before_they_are_quantised(recipe, tmp_path):
    folder = train(recipe(method="qlora"), SCREEN)
    tiny.model("llama", seed=1).save_pretrained(tmp_path / "other")
    tiny.tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="other weights"):
        open_model([folder], base=str(tmp_path / "other"))


def test_two_adapters_share_a_quantised_base_unless_one_has_its_own(recipe):
    first = train(recipe("a", method="qlora"), SCREEN)
    second = train(recipe("b", method="qdora"), SCREEN)
    own = train(recipe("c", method="qlora", init="pissa"), SCREEN)
    dense = train(recipe("d"), SCREEN)
    alone = logits_of(second)
    opened = open_model([first, second])
    opened.use("b")
    with torch.no_grad():
        assert torch.equal(opened.language.model(torch.arange(5, 60)[None]).logits, alone)
    for other in (own, dense):
        with pytest.raises(UserError, match="quantised in different ways"):
            open_model([first, other])


def test_a_plain_model_is_measured_as_the_recipe_keeps_it(recipe, tiny_folder, tmp_path):
    asked = recipe(method="qlora")
    folder = train(asked, SCREEN)
    written = tmp_path / "asked.yaml"
    written.write_text((folder / "recipe.yaml").read_text())
    report = evaluate(tiny_folder, written, [], SCREEN)
    assert report["base"]["loss"] == pytest.approx(
        evaluate(folder, None, [], SCREEN)["base"]["loss"], rel=1e-6
    )
    plain = evaluate(tiny_folder, written, ["model.quantize=none"], SCREEN)
    assert plain["base"]["loss"] != report["base"]["loss"]


# ---- QA-LoRA ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder_of_groups(tmp_path: Path) -> Path:
    """A tiny model with several groups of 32 inputs in a row, some of them short."""
    sizes = {"hidden_size": 72, "intermediate_size": 80, "head_dim": 16}
    tiny.model("llama", **sizes).save_pretrained(tmp_path / "groups")
    tiny.tokenizer().save_pretrained(tmp_path / "groups")
    return tmp_path / "groups"


def pooled(width: int = 72, kind: type = nn.Linear, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(view of an int4 layer, ΔW with random factors)."""
    plain = (kind(width, 50) if kind is nn.Linear else kind(50, width)).to(dtype).requires_grad_(False)
    base = view_of(plain)[1]
    layer = parts.load("base", "int4").quantise(base, base.weight())
    delta = parts.load("delta", "pooled").make(Place(View(layer), 4, 0.7))
    for parameter in (delta.A, delta.B):
        nn.init.normal_(parameter, std=0.2)
    return View(layer), delta


@pytest.mark.parametrize("width", [32, 72, 96, 5])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooled_multiplies_sums_of_groups(width, kind, dtype):
    base, delta = pooled(width, kind, dtype)
    x, y = torch.randn(3, 7, width).to(dtype), torch.randn(3, 7, 50).to(dtype)
    count = -(-width // 32)
    assert delta.A.shape == (4, count)
    sums = torch.stack([x[..., 32 * n : 32 * n + 32].double().sum(-1) for n in range(count)], -1)
    expected = y.double() + 0.7 * sums @ delta.A.double().t() @ delta.B.double().t()
    allowed = 2e-5 if dtype is torch.float32 else 0.05 * expected.abs().max().item()
    torch.testing.assert_close(delta.add_to(y.clone(), x).double(), expected, rtol=0, atol=allowed)
    W = delta.weight().double()
    torch.testing.assert_close(x.double() @ W.t(), expected - y.double(), rtol=1e-4, atol=1e-4)
    assert all(W[:, 32 * n : 32 * n + 32].sub(W[:, 32 * n, None]).any() == 0 for n in range(count))
    live = delta.beside(base, x, x).double()
    merged = base.replaced((base.weight() + delta.weight()), None if base.bias is None else base.bias.float())
    expected = merged(x.float()).double()
    allowed = 2e-5 if dtype is torch.float32 else 0.05 * expected.abs().max().item()
    torch.testing.assert_close(live, expected, rtol=0, atol=allowed)


def test_pooled_keeps_of_its_inputs_only_their_sums():
    _, delta = pooled(96)
    kept: list[Tensor] = []
    x = torch.randn(5, 96)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        delta.add_to(torch.zeros(5, 50, requires_grad=True) * 1, x)
    assert all(tensor.shape[-1] != 96 for tensor in kept)
    assert any(tensor.shape == (5, 3) for tensor in kept)


def test_pooled_starts_with_rows_as_long_as_those_of_lora():
    delta = parts.load("delta", "pooled").make(Place(view_of(plain_layer(50, 6400))[1], 64, 1.0))
    with torch.no_grad():
        delta.start(torch.Generator().manual_seed(0))
    assert delta.down().std().item() == pytest.approx(6400**-0.5 / 3**0.5, rel=0.03)
    assert not delta.B.any()


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_pooled_adds_goes_into_the_zero_points_alone(kind, dtype):
    base, delta = pooled(80, kind, dtype)
    layer, of_group = base.module, torch.arange(80) // 32
    change = delta.weight()[:, ::32]
    codes = torch.stack([layer.codes >> 4, layer.codes & 15], -1).flatten(1)[:, :80]
    exact = (
        codes.double() * layer.scale.double()[:, of_group]
        + (layer.zero.double() + change.double())[:, of_group]
    )
    merged = base.weight() + delta.weight()
    torch.testing.assert_close(merged.double(), exact, rtol=2**-22, atol=2**-23 * exact.abs().max().item())
    again = parts.load("base", "int4").quantise(layer.plain, merged)
    assert torch.equal(again.codes, layer.codes)
    assert torch.equal(again.scale, layer.scale)
    assert torch.equal(again.zero, layer.zero + change)


def test_llama_cpp_finds_the_trained_codes_in_the_merged_weights():
    """Its Q4_1 has groups of 32 with a smallest value, too; scale and smallest value are in float16."""
    from gguf import GGMLQuantizationType, dequantize, quantize

    base, delta = pooled(96)
    merged = base.weight() + delta.weight()
    stored = quantize(merged.numpy(), GGMLQuantizationType.Q4_1)
    halves = torch.from_numpy(stored).view(50, 3, 20)[..., 4:]
    codes = torch.cat([halves & 15, halves >> 4], -1)
    ours = base.module.codes
    assert torch.equal(codes, torch.stack([ours >> 4, ours & 15], -1).flatten(-2))
    theirs = torch.from_numpy(dequantize(stored, GGMLQuantizationType.Q4_1))
    torch.testing.assert_close(theirs, merged, rtol=2**-9, atol=2**-9 * merged.abs().max().item())


@pytest.mark.parametrize(("targets", "learning_rate"), [("all-linear", 1e-2), (("q_proj", "down_proj"), 0.3)])
def test_the_merged_model_in_int4_is_the_one_that_was_trained(
    recipe, folder_of_groups, targets, learning_rate, tmp_path
):
    asked = recipe(method="qa_lora", model={"name": str(folder_of_groups)}, target_modules=targets)
    asked = asked.model_copy(
        update={"train": asked.train.model_copy(update={"learning_rate": learning_rate})}
    )
    folder = train(asked, SCREEN)
    live = logits_of(folder)
    trained = open_model([folder]).language.model
    report = merge(folder, tmp_path / "merged", None, SCREEN)
    assert all(report["codes_kept"].values())
    again = open_model([tmp_path / "merged"], quantize="int4").language.model
    before = {n.replace(".base_layer", ""): m for n, m in trained.named_modules() if isinstance(m, Quantised)}
    after = {n: m for n, m in again.named_modules() if isinstance(m, Quantised)}
    assert before.keys() == after.keys()
    moved = [not torch.equal(layer.zero, after[name].zero) for name, layer in before.items()]
    assert sum(moved) == len(report["codes_kept"])
    for name, layer in before.items():
        assert torch.equal(layer.codes, after[name].codes)
        assert torch.equal(layer.scale, after[name].scale)
    with torch.no_grad():
        found = again(torch.arange(5, 60)[None]).logits
    assert probe.distance(found, live) < 1e-5
    with torch.no_grad():
        base = (
            open_model([folder_of_groups], quantize="int4").language.model(torch.arange(5, 60)[None]).logits
        )
    assert probe.distance(found, base) > 1e-2, "something was learned"


def test_what_another_adapter_adds_does_not_keep_the_codes_and_nobody_says_so(
    recipe, folder_of_groups, tmp_path
):
    folder = train(recipe(model={"name": str(folder_of_groups), "quantize": "int4"}), SCREEN)
    assert "codes_kept" not in merge(folder, tmp_path / "merged", None, SCREEN)
    again = open_model([tmp_path / "merged"], quantize="int4").language.model
    before = open_model([folder]).language.model
    codes = {
        n.replace(".base_layer", ""): m.codes for n, m in before.named_modules() if isinstance(m, Quantised)
    }
    after = {n: m.codes for n, m in again.named_modules() if isinstance(m, Quantised)}
    assert not all(torch.equal(codes[name], after[name]) for name in codes)


def test_rounding_that_moves_codes_is_told(recipe, folder_of_groups, tmp_path, capsys):
    """A change so large that a step of bfloat16 is as wide as one of the codes."""
    asked = recipe(method="qa_lora", model={"name": str(folder_of_groups)})
    asked = asked.model_copy(update={"train": asked.train.model_copy(update={"learning_rate": 3.0})})
    folder = train(asked, SCREEN)
    capsys.readouterr()
    kept = merge(folder, tmp_path / "merged", "bfloat16", SCREEN)["codes_kept"]
    said = capsys.readouterr().err.replace("\n", " ")
    assert not all(kept.values())
    assert f"{sum(kept.values())} of {len(kept)} adapted layers" in said
    assert "--dtype float32 keeps all" in said
    assert all(merge(folder, tmp_path / "again", "float32", SCREEN)["codes_kept"].values())


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_pooled_needs_zero_points(recipe, quantize):
    with pytest.raises(UserError, match=r"delta: pooled\): needs base\.int4.*\n?.*leave model\.quantize out"):
        train(recipe(method="qa_lora", model={"name": "/nowhere/model", "quantize": quantize}), SCREEN)


# ---- progress --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lq_lora", "pissa"])
def test_a_slow_start_is_counted_layer_by_layer(recipe, method, monkeypatch):
    counted: list[tuple[str, int, list[int]]] = []

    class Counted:
        def __init__(self, console: Any, what: str, total: int) -> None:
            counted.append((what, total, []))

        def __enter__(self) -> "Counted":
            return self

        def __exit__(self, *_: object) -> None: ...

        def advance(self, count: int) -> None:
            counted[-1][2].append(count)

    monkeypatch.setattr("lora_cli.progress.Counter", Counted)
    train(recipe(method=method, target_modules=("q_proj", "lm_head")), SCREEN)
    started = [(total, done) for what, total, done in counted if what == "starting layers"]
    total = 3 if method == "pissa" else 15
    assert started == [(total, [1] * total)]


# ---- other tools ----------------------------------------------------------------------------------------------------


@pytest.fixture
def wide_folder(tmp_path: Path) -> Path:
    """A tiny model whose rows end with a block of 64, as bitsandbytes needs them on a CPU."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    tiny.model("llama", **sizes).save_pretrained(tmp_path / "wide")
    tiny.tokenizer().save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


def in_4_bits(folder: Path, **more: Any) -> Any:
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, **more
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("method", ["qlora", "qdora", "loftq"])
def test_peft_over_bitsandbytes_computes_what_was_trained(recipe, method, wide_folder, tmp_path):
    from peft import PeftModel

    folder = train(recipe(method=method, model={"name": str(wide_folder)}), SCREEN)
    export(folder, "peft", tmp_path / "exported", SCREEN)
    theirs = PeftModel.from_pretrained(in_4_bits(wide_folder), tmp_path / "exported").train()
    with torch.no_grad():
        found = theirs(torch.arange(5, 60)[None]).logits
    assert probe.distance(found, logits_of(folder)) < 1e-4


@pytest.mark.oracle
@pytest.mark.parametrize("case", ["qpissa", "loftq of its own base"])
def test_an_adapter_that_fits_a_base_of_its_own_is_kept_from_peft(recipe, case, tmp_path):
    from peft import PeftConfig

    folder = train(recipe(**CASES[case]), SCREEN)
    with pytest.raises(UserError, match="PEFT would quantise all of it"):
        export(folder, "peft", tmp_path / "exported", SCREEN)
    assert not (tmp_path / "exported").exists()
    with pytest.raises(KeyError):
        PeftConfig.from_pretrained(folder)


@pytest.fixture(params=["nf4", "nf4, plain", "fp4", "int8"])
def packed_llama(request, wide_folder: Path, tmp_path: Path) -> Path:
    return packed(wide_folder, tmp_path / "packed", request.param)


def packed(plain: Path, folder: Path, form: str, dtype: torch.dtype = torch.float32) -> Path:
    """A model as transformers saves it that bitsandbytes quantised."""
    config = {
        "nf4": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
        "nf4 in bfloat16": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_quant_storage=torch.bfloat16,
        ),
        "nf4, plain": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "fp4": BitsAndBytesConfig(load_in_4bit=True),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
    }[form]
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=dtype)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def test_a_model_that_is_stored_quantised_is_a_base(recipe, packed_llama, request, tmp_path):
    asked = recipe(model={"name": str(packed_llama)})
    folder = train(asked, SCREEN)
    report = evaluate(folder, None, [], SCREEN)
    assert report["adapter"]["loss"] < report["base"]["loss"]
    # in evaluation bitsandbytes packs weights for the CPU, 64 at a time: these rows are shorter
    theirs = AutoModelForCausalLM.from_pretrained(packed_llama, dtype=torch.float32).train()
    with torch.no_grad():
        found = logits_of(packed_llama)
        expected = theirs(torch.arange(5, 60)[None]).logits
    rounds_inputs = "int8" in request.node.name
    assert probe.distance(found, expected) < (0.02 if rounds_inputs else 1e-5)
    merge(folder, tmp_path / "merged", None, SCREEN)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        assert probe.distance(merged(torch.arange(5, 60)[None]).logits, logits_of(folder)) < 1e-5


def test_conv1d_layers_come_back_as_conv1d(tmp_path):
    tiny.model("gpt2").save_pretrained(tmp_path / "gpt2")
    tiny.tokenizer().save_pretrained(tmp_path / "gpt2")
    folder = packed(tmp_path / "gpt2", tmp_path / "packed", "nf4")
    language = open_model([folder]).language
    x = ids()
    with torch.no_grad():
        before = language.model(x).logits
    made = plans.make(AdapterRecipe(r=4), language.model, language.ends)
    inject.merge(language.model, inject.inject(language.model, made))
    assert {type(m).__name__ for n, m in language.model.named_modules() if n.endswith("c_attn")} == {"Conv1D"}
    with torch.no_grad():
        torch.testing.assert_close(language.model(x).logits, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["loftq", "lq", "lq_fisher", "lqer", "lora_ga"])
def test_what_needs_the_original_weights_is_refused_where_there_are_none(recipe, init, tiny_folder, tmp_path):
    folder = packed(tiny_folder, tmp_path / "packed", "nf4")
    asked = recipe(model={"name": str(folder), "quantize": "none"}, init=init)
    for command in (train, lambda asked, screen: check(Loaded(asked, {}, "recipe"), screen, 0)):
        with pytest.raises(UserError, match=rf"(?s)init: {init}"):
            command(asked, SCREEN)


def test_a_stored_quantised_model_is_not_quantised_again(recipe, tiny_folder, tmp_path):
    folder = packed(tiny_folder, tmp_path / "packed", "nf4")
    with pytest.raises(UserError, match="stored in nf4 already"):
        train(recipe(model={"name": str(folder)}, method="qlora"), SCREEN)


@pytest.mark.parametrize(
    "stored", [{"quant_method": "gptq", "bits": 5}, {"quant_method": "new"}, {"bits": 3}, {}]
)
def test_a_model_that_is_quantised_in_another_way_is_refused_by_name(recipe, stored, tiny_folder, tmp_path):
    folder = tmp_path / "stored"
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": stored}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=rf"stored quantised \({stored.get('quant_method', 'not said how')}\)"
    ):
        train(recipe(model={"name": str(folder)}), SCREEN)


# ---- what is refused ------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    **{
        name: ({"method": name}, "cannot be combined with model.quantize: nf4")
        for name in (
            "full",
            "optimizer_view",
            "serial",
            "relora",
            "cola",
            "xgblora",
            "flora",
            "galore",
            "random_projection",
        )
    },
    "everything": ({"train_also": ("everything",)}, "cannot be trained in full"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_writes_to_w_is_refused_before_anything_is_loaded(recipe, case):
    adapter, reason = REFUSED[case]
    asked = recipe(model={"name": "/nowhere/model", "quantize": "nf4"}, **adapter)
    for command in (train, lambda asked, screen: check(Loaded(asked, {}, "recipe"), screen, 0)):
        with pytest.raises(UserError, match=reason):
            command(asked, SCREEN)


@pytest.mark.parametrize("init", ["loftq", "lq", "lq_fisher", "lqer"])
def test_a_start_that_makes_up_for_quantising_needs_it(recipe, init):
    with pytest.raises(UserError, match=rf"init: {init}: needs base.quantized"):
        train(recipe(model={"name": "/nowhere/model"}, init=init), SCREEN)
    with pytest.raises(UserError, match=r"needs base\.quantized"):
        train(recipe(model={"name": "/nowhere/model", "quantize": "none"}, method="loftq"), SCREEN)


@pytest.mark.parametrize(("method", "plain"), [("qlora", "lora"), ("qdora", "dora")])
def test_a_method_that_is_named_after_its_few_bits_does_not_train_another_one_without_a_word(
    recipe, method, plain, tiny_folder, tmp_path
):
    asked = recipe(method=method, model={"quantize": "none"})
    for command in (train, lambda asked, screen: check(Loaded(asked, {}, "recipe"), screen, 0)):
        with pytest.raises(
            UserError, match=rf"{method} is for a base in few bits.*would be {plain}"
        ) as caught:
            command(asked, SCREEN)
        assert f"adapter.method: {plain}" in caught.value.fix
    stored = packed(tiny_folder, tmp_path / "packed", "nf4")
    check(
        Loaded(recipe(method=method, model={"name": str(stored), "quantize": "none"}), {}, "recipe"),
        SCREEN,
        0,
    )


def test_a_quantised_weight_is_not_written_to():
    with pytest.raises(UserError, match="cannot be written to"):
        View(quantised("nf4", plain_layer())).set_weight(torch.zeros(96, 128))


def test_without_the_package_the_error_says_how_to_get_it(recipe, monkeypatch):
    monkeypatch.setattr(parts.load("base", "nf4"), "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs bitsandbytes") as caught:
        train(recipe(model={"name": "/nowhere/model"}, method="qlora"), SCREEN)
    assert "pip install" in caught.value.fix
