"""The starts are the decompositions that they say, of W0, of the layer's inputs or of its gradient."""

import random
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_cli import model as models
from lora_cli import parts
from lora_cli.adapter import files, inject, peft_format
from lora_cli.adapter import plan as plans
from lora_cli.adapter.base import Base
from lora_cli.adapter.delta import LowRank, Place
from lora_cli.adapter.plan import view_of
from lora_cli.adapter.seed import generator_of
from lora_cli.adapter.start import Start
from lora_cli.errors import UserError
from lora_cli.methods.init import corda, eva
from lora_cli.parts import Part
from lora_cli.recipe.schema import AdapterRecipe
from lora_cli.train.measure import measure
from tests import tiny
from tests.adapters import SHIFTS, ids, put_on
from tests.training import NO_DROPOUT, Rows, distance, training

R, S = 4, 0.7
SHAPES = ((20, 12), (12, 20), (16, 16))
"""[out, in]: tall, wide, square."""
KINDS = [(kind, shape) for kind in ("linear", "conv1d") for shape in SHAPES]


@pytest.fixture(autouse=True)
def _other_numbers_in_every_session():
    torch.manual_seed(random.getrandbits(48))


def base_of(kind: str, shape: tuple[int, int]) -> Base:
    """W0 with singular values from 3 to 1/2, so that its directions are told apart."""
    out, width = shape
    base = view_of((nn.Linear(width, out) if kind == "linear" else Conv1D(out, width)).requires_grad_(False))[
        1
    ]
    U, values, Vt = spectrum(torch.randn(shape))
    base.set_weight((U * torch.linspace(3, 0.5, len(values)) @ Vt).float())
    return base


def started(init: str, base: Base, statistic: Tensor | None = None, r: int = R, **settings: Any) -> LowRank:
    """LoRA at its first step."""
    delta = parts.load("delta", "lowrank").make(Place(base, r, S))
    with torch.no_grad():
        start = Start(base, generator_of(random.getrandbits(32), "layer"), statistic)
        parts.load("init", init).init(delta, start, **parts.settings("init", Part(init, settings)))
    return delta


def product(delta: LowRank) -> Tensor:
    """s·B·A in float64, without what is subtracted."""
    return S * delta.B.detach().double() @ delta.A.detach().double()


def spectrum(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, Σ, Vᵀ in float64."""
    return torch.linalg.svd(W.double(), full_matrices=False)


def angle(found: Tensor, expected: Tensor) -> float:
    """Sine of the largest principal angle between the spans of the rows, in float64."""
    a, b = (torch.linalg.qr(rows.detach().double().t())[0] for rows in (found, expected))
    return torch.linalg.matrix_norm(b - a @ (a.t() @ b), 2).item()


# ---- pissa and milora ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "shape"), KINDS)
def test_pissa_leaves_the_tail_of_the_spectrum(kind, shape):
    """‖W0 − s·B·A‖² = Σ σ² over the rest: nothing of rank r is nearer to W0."""
    base = base_of(kind, shape)
    U, values, Vt = spectrum(base.weight())
    delta = started("pissa", base)
    left = base.weight().double() - product(delta)
    assert left.square().sum().item() == pytest.approx(values[R:].square().sum().item(), rel=1e-5)
    assert distance(product(delta), U[:, :R] * values[:R] @ Vt[:R]) < 1e-4
    assert distance(delta.A.detach().norm(dim=1), (values[:R] / S).sqrt()) < 1e-5, "s is shared by both"
    assert distance(delta.B.detach().norm(dim=0), (values[:R] / S).sqrt()) < 1e-5


@pytest.mark.parametrize(("kind", "shape"), KINDS)
def test_milora_takes_the_r_smallest(kind, shape):
    base = base_of(kind, shape)
    U, values, Vt = spectrum(base.weight())
    delta = started("milora", base)
    assert distance(product(delta), U[:, -R:] * values[-R:] @ Vt[-R:]) < 1e-4
    left = torch.linalg.svdvals(base.weight().double() - product(delta))
    assert distance(left[: len(values) - R], values[:-R]) < 1e-5, "the largest are left alone"
    assert left[len(values) - R :].max() < 1e-5 * values[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_fast_pissa_gets_to_the_exact_one(shape):
    """On a W0 each of whose singular values is half the one before."""
    base = base_of("linear", shape)
    U, _, Vt = spectrum(base.weight())
    base.set_weight((U * 0.5 ** torch.arange(min(shape)) @ Vt).float())
    best = spectrum(base.weight())[1][R:].square().sum().sqrt().item()
    errors = [(base.weight() - product(started("pissa", base, niter=n))).norm().item() for n in (1, 2, 16)]
    assert all(error >= best * (1 - 1e-5) for error in errors)
    assert errors[2] == pytest.approx(best, rel=1e-4)
    assert errors[0] > errors[2]


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (200, 200)])
def test_fast_pissa_leaves_within_one_percent_of_the_least_on_the_flattest_spectrum(shape):
    """That of a matrix of noise, where no direction stands out: no trained weight is harder."""
    base = base_of("linear", shape)
    base.set_weight(torch.randn(shape))
    best = spectrum(base.weight())[1][R:].square().sum().sqrt().item()
    left = (base.weight() - product(started("pissa", base, niter=8))).norm().item()
    assert best * (1 - 1e-5) <= left <= best * 1.01


def test_fast_pissa_leaves_the_random_numbers_of_everybody_else_alone():
    base = base_of("linear", SHAPES[0])
    state = torch.get_rng_state()
    started("pissa", base, niter=2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("init", ["pissa", "milora", "olora", "corda", "lora_ga"])
def test_an_r_above_the_rank_of_w0_still_starts_at_the_base(init):
    base = base_of("linear", (6, 10))
    statistic = {"corda": torch.eye(10), "lora_ga": torch.randn(6, 10)}.get(init)
    delta = started(init, base, statistic, r=8)
    assert torch.isfinite(delta.A).all()
    assert torch.isfinite(delta.B).all()
    assert delta.weight().norm() < 1e-5 * base.weight().norm()
    if init in ("pissa", "milora", "corda"):
        assert distance(product(delta), base.weight()) < 1e-5


# ---- olora and orthogonal -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "shape"), KINDS)
def test_olora_is_an_orthonormal_b_and_a_trapezoid(kind, shape):
    """Of W0 as [out, in]: a Conv1D that is square does not show by its shape that it is stored the other way."""
    base = base_of(kind, shape)
    delta = started("olora", base)
    A, B = delta.A.detach().double(), delta.B.detach().double()
    assert distance(B.t() @ B, torch.eye(R)) < 1e-6
    assert torch.equal(A.triu(), A)
    assert distance(B @ A[:, :R], base.weight()[:, :R]) < 1e-5, "the first r columns of W0 are all theirs"
    assert distance(B @ A, B @ B.t() @ base.weight().double()) < 1e-5, "W0 as seen from the span of B"


@pytest.mark.parametrize(("r", "width"), [(4, 12), (12, 12), (15, 12)])
def test_orthogonal_rows_are_orthonormal(r, width):
    A = started("orthogonal", base_of("linear", (9, width)), r=r).A.detach().double()
    gram = A @ A.t() if r <= width else A.t() @ A
    assert distance(gram, torch.eye(min(r, width))) < 1e-6


def test_asymmetric_lora_keeps_its_orthonormal_rows_to_the_bit():
    from lora_cli.train.loop import train_steps

    run = training({"method": "asymmetric"}, {"max_steps": 3, "learning_rate": 0.01})
    before = {name: delta.A.detach().clone() for name, delta in run.adapter.deltas.items()}
    list(train_steps(run))
    for name, delta in run.adapter.deltas.items():
        assert torch.equal(delta.A, before[name])
        assert distance(delta.A.detach() @ delta.A.detach().t(), torch.eye(R)) < 1e-6
        assert torch.count_nonzero(delta.B)


# ---- what is subtracted -------------------------------------------------------------------------------------------


def on(kind: str, **adapter: Any) -> tuple[PreTrainedModel, inject.Adapter]:
    """A tiny model at the start of a method, measured where its init asks."""
    run = training(adapter, kind=kind)
    return run.model.eval(), run.adapter


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("init", ["eva", "orthogonal", *SHIFTS])
def test_the_model_starts_as_the_base_whose_weights_are_not_touched(init, kind):
    plain = tiny.model(kind, **(NO_DROPOUT if kind == "gpt2" else {}))
    model, adapter = on(kind, init=init)
    x = ids()
    assert distance(model(x).logits, plain(x).logits) < 2e-6
    for name, delta in adapter.deltas.items():
        assert torch.equal(delta.weight().isfinite(), torch.ones_like(delta.weight(), dtype=torch.bool))
        assert torch.equal(adapter.layers[name].base_layer.weight, plain.get_submodule(name).weight)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("init", SHIFTS)
def test_what_is_saved_fits_the_original_base_as_rank_2r(init, kind, tmp_path):
    from lora_cli.train.loop import train_steps

    run = training({"init": init, "alpha": 4.0}, {"max_steps": 5, "learning_rate": 0.01}, kind=kind)
    list(train_steps(run))
    x = ids()
    learned = run.model.eval()(x).logits
    files.save(tmp_path, run.adapter, "the/base", None)
    original = tiny.model(kind)
    plain = original(x).logits
    loaded = put_on(original, tmp_path)
    assert {spec.r for spec in loaded.plan.layers} == {2 * R}
    assert distance(original(x).logits, learned) < 1e-6
    assert distance(plain, learned) > 1e-3


# ---- measured -----------------------------------------------------------------------------------------------------


def measured(kind: str, model: PreTrainedModel, rows: Rows, names: list[str], numbers: list[int]):
    bases = {name: peft_format.base_of(model, name) for name in names}
    return measure(kind, model, bases, rows, numbers, precision=torch.float32, pad_id=0)


def inputs_by_hand(model: PreTrainedModel, token_ids: tuple[int, ...]) -> dict[str, Tensor]:
    """What goes into some layers of the first block, [tokens, in], from the hidden states of one row."""
    hidden = model(torch.tensor([token_ids]), output_hidden_states=True).hidden_states[0][0]
    if model.config.model_type == "gpt2":
        return {"transformer.h.0.attn.c_attn": model.transformer.h[0].ln_1(hidden)}
    block = model.model.layers[0]
    seen: list[Tensor] = []
    handle = block.mlp.register_forward_hook(lambda module, given, _: seen.append(given[0][0]))
    model(torch.tensor([token_ids]))
    handle.remove()
    mlp, x = block.mlp, seen[0]
    return {
        "model.layers.0.self_attn.q_proj": block.input_layernorm(hidden),
        "model.layers.0.mlp.down_proj": mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x),
    }


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_measured_inputs_are_the_mean_over_all_tokens_of_rows_of_different_lengths(kind):
    model, rows = tiny.model(kind), Rows(12)
    chosen = [7, 2, 5, 11, 3]
    assert len({len(rows[number].input_ids) for number in range(12)}) > 1
    found = [inputs_by_hand(model, rows[number].input_ids) for number in chosen]
    for name in found[0]:
        x = torch.cat([each[name] for each in found]).double()
        C = measured("inputs", model, rows, [name], chosen)[name]
        assert distance(C, x.t() @ x / len(x)) < 1e-6


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_measured_gradient_is_that_of_the_loss_per_trained_token(kind):
    model, rows = tiny.model(kind), Rows(12)
    chosen = [7, 2, 5]
    names = ["model.layers.1.mlp.up_proj", "model.layers.0.self_attn.v_proj"]
    names = names if kind == "llama" else ["transformer.h.1.mlp.c_fc", "transformer.h.0.attn.c_attn"]
    found = measured("gradients", model, rows, names, chosen)
    assert all(p.grad is None for p in model.parameters())
    total, tokens = torch.zeros(()), 0
    for number in chosen:
        x = torch.tensor([rows[number].input_ids])
        logits = model(x).logits[0, :-1]
        total = total + nn.functional.cross_entropy(logits, x[0, 1:], reduction="sum")
        tokens += x.shape[1] - 1
    for name, G in found.items():
        weight = model.get_submodule(name).weight
        expected = torch.autograd.grad(total / tokens, weight, retain_graph=True)[0]
        assert distance(G, expected if kind == "llama" else expected.t()) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_measured_fisher_is_the_means_of_squared_gradients_of_single_rows(kind):
    model, rows, chosen = tiny.model(kind), Rows(12), [7, 2, 5]
    name = "model.layers.1.mlp.up_proj" if kind == "llama" else "transformer.h.1.mlp.c_fc"
    (found,) = measured("fisher", model, rows, [name], chosen).values()
    weight = model.get_submodule(name).weight
    squared, tokens = torch.zeros_like(weight, dtype=torch.float64), 0
    for number in chosen:
        x = torch.tensor([rows[number].input_ids])
        loss = nn.functional.cross_entropy(model(x).logits[0, :-1], x[0, 1:], reduction="sum")
        squared += torch.autograd.grad(loss, weight)[0].double().square()
        tokens += x.shape[1] - 1
    squared = squared if kind == "llama" else squared.t()
    assert distance(found, torch.cat([squared.mean(1), squared.mean(0)]) / tokens) < 1e-5


def test_measuring_leaves_the_model_as_it_was():
    model, rows = tiny.model("llama").requires_grad_(False), Rows(3)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for kind in ("inputs", "gradients", "fisher"):
        measured(kind, model, rows, ["model.layers.0.self_attn.q_proj"], [0, 1])
    assert all(torch.equal(p, before[name]) and not p.requires_grad for name, p in model.named_parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


# ---- eva ------------------------------------------------------------------------------------------------------------


def inputs(width: int, tokens: int = 60) -> Tensor:
    """Inputs that are not centred and whose directions are told apart: singular values from 2 to 1."""
    left, right = (torch.linalg.qr(torch.randn(n, width, dtype=torch.float64))[0] for n in (tokens, width))
    return left * torch.linspace(2, 1, width) @ right.t() * tokens**0.5


@pytest.mark.parametrize(("kind", "shape"), KINDS)
def test_eva_spans_the_leading_right_singular_vectors_of_the_inputs(kind, shape):
    x = inputs(shape[1])
    C = (x.t() @ x / len(x)).float()
    delta = started("eva", base_of(kind, shape), C)
    directions = spectrum(x)[2]
    assert angle(delta.A, directions[:R]) < 1e-3
    assert angle(delta.A, directions[1 : R + 1]) > 0.9
    assert distance(delta.A.detach() @ delta.A.detach().t(), torch.eye(R)) < 1e-5
    assert not torch.count_nonzero(delta.B)


def test_eva_on_a_model_keeps_as_much_of_the_inputs_as_r_directions_can():
    run = training({"method": "eva", "init": "eva"}, rows=(rows := Rows(8)))
    model = tiny.model("llama")
    with torch.no_grad():
        found = [inputs_by_hand(model, rows[number].input_ids) for number in run.rows(0)]
    for name in found[0]:
        x = torch.cat([each[name] for each in found]).double()
        A = run.adapter.deltas[name].A.detach().double()
        best = torch.linalg.svdvals(x)[:R].square().sum().item()
        assert (x @ A.t()).square().sum().item() == pytest.approx(best, rel=1e-5)


@given(
    wanted=st.lists(st.tuples(st.integers(1, 4), st.integers(4, 40)), min_size=1, max_size=6),
    rho=st.sampled_from([1.0, 1.5, 2.0, 3.0]),
)
def test_eva_shares_out_the_sum_of_ranks_and_no_layer_gets_more_than_rho_r(wanted, rho):
    """Also where a wide layer's inputs vary alike in all directions, none of which explains much."""
    names = {f"layer {index}": r for index, (r, _) in enumerate(wanted)}
    statistics = {name: torch.eye(width) for name, (_, width) in zip(names, wanted, strict=True)}
    ranks = eva.ranks(names, statistics, rho=rho, rows=30)
    assert ranks.keys() == names.keys()
    assert sum(ranks.values()) == sum(names.values())
    assert all(1 <= ranks[name] <= int(rho * r) for name, r in names.items())


def test_eva_gives_a_rank_to_the_directions_that_explain_most():
    """Σ of the shares that are kept is the largest that so many ranks can have, by trying all."""
    names = {"a": 2, "b": 2, "c": 1}
    widths = {"a": 5, "b": 7, "c": 6}
    statistics = {name: (x := torch.randn(40, n) * torch.rand(n)).t() @ x for name, n in widths.items()}
    shares = {name: torch.linalg.eigvalsh(C).flip(0) / C.trace() for name, C in statistics.items()}

    def kept(ranks: dict[str, int]) -> float:
        return sum(shares[name][:r].sum().item() for name, r in ranks.items())

    found = eva.ranks(names, statistics, rho=2.0, rows=40)
    possible = [
        {"a": a, "b": b, "c": 5 - a - b} for a in range(1, 5) for b in range(1, 5) if 1 <= 5 - a - b <= 2
    ]
    assert kept(found) == pytest.approx(max(map(kept, possible)), rel=1e-5)


@pytest.mark.parametrize("scale", ["alpha_over_r", "rslora"])
@pytest.mark.parametrize("combine", ["add", "dora"])
def test_a_layer_with_another_rank_keeps_its_scale_on_disk_too(scale, combine, tmp_path):
    model, x = tiny.model("llama"), ids()
    recipe = AdapterRecipe(method="eva", r=R, scale=scale, combine=combine)
    plan = plans.make(recipe, model, models.ends_of(model))
    before = {spec.name: spec.scale for spec in plan.layers}
    ranks = {spec.name: 1 + index % (2 * R) for index, spec in enumerate(plan.layers)}
    plan = plans.with_ranks(plan, ranks)
    statistics = {spec.name: torch.eye(spec.in_features) for spec in plan.layers}
    adapter = inject.inject(model, plan, 0, statistics)
    assert {name: delta.A.shape[0] for name, delta in adapter.deltas.items()} == ranks
    assert {name: delta.scale for name, delta in adapter.deltas.items()} == before
    planned = sum(spec.num_trainable for spec in plan.layers)
    assert planned == sum(p.numel() for p in adapter.trainable().values())
    with torch.no_grad():
        for delta in adapter.deltas.values():
            delta.B.normal_(std=0.1)
    files.save(tmp_path, adapter, "the/base", None)
    again = tiny.model("llama")
    loaded = put_on(again, tmp_path)
    assert {name: delta.A.shape[0] for name, delta in loaded.deltas.items()} == ranks
    assert distance(again(x).logits, model(x).logits) < 1e-6


# ---- corda ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize(("kind", "shape"), KINDS)
def test_corda_with_all_components_is_w0(kind, shape, mode):
    base, x = base_of(kind, shape), inputs(shape[1])
    delta = started("corda", base, (x.t() @ x / len(x)).float(), r=min(shape), mode=mode)
    assert distance(product(delta), base.weight()) < 1e-5


@pytest.mark.parametrize(("mode", "plain"), [("ipm", "pissa"), ("kpm", "milora")])
@pytest.mark.parametrize(("kind", "shape"), KINDS)
def test_corda_of_inputs_alike_in_all_directions_is_pissa_or_milora(kind, shape, mode, plain):
    base = base_of(kind, shape)
    found, expected = started("corda", base, torch.eye(shape[1]), mode=mode), started(plain, base)
    assert distance(product(found), product(expected)) < 1e-4
    assert distance(found.A.detach().norm(dim=1), expected.A.detach().norm(dim=1)) < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_corda_leaves_the_tail_of_the_spectrum_as_the_inputs_see_it(shape):
    """‖(W0 − s·B·A)·C‖² = Σ σ(W0·C)² over the rest with ipm, over the first with kpm."""
    base, x = base_of("linear", shape), inputs(shape[1])
    C = x.t() @ x / len(x)
    values = spectrum(base.weight().double() @ C)[1].square()
    for mode, rest in (("ipm", values[R:]), ("kpm", values[:-R])):
        left = (base.weight().double() - product(started("corda", base, C.float(), mode=mode))) @ C
        assert left.square().sum().item() == pytest.approx(rest.sum().item(), rel=1e-4)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize(("tokens", "absent"), [(3, 0), (3, 2), (60, 2)])
def test_corda_works_where_the_inputs_leave_directions_out(tokens, absent, mode):
    """Fewer tokens than inputs, and inputs that are always zero: C has no inverse until it is damped."""
    base, x = base_of("linear", (20, 12)), torch.randn(tokens, 12)
    x[:, :absent] = 0
    delta = started("corda", base, x.t() @ x / tokens, mode=mode)
    A, B = delta.A.detach(), delta.B.detach()
    assert torch.isfinite(A).all()
    assert torch.isfinite(B).all()
    assert delta.weight().norm() < 1e-5 * base.weight().norm()
    assert A.abs().max() < 1e4 * B.abs().max(), "neither factor is out of all proportion"


def test_what_was_never_seen_is_no_reason_to_stop():
    """A layer without a single input: C = 0."""
    base, nothing = base_of("linear", SHAPES[0]), torch.zeros(12, 12)
    assert distance(product(started("corda", base, nothing)), product(started("pissa", base))) < 1e-4
    ranks = eva.ranks({"a": 2, "b": 2}, {"a": nothing, "b": torch.eye(12)}, rho=2.0, rows=1)
    assert ranks == {"a": 1, "b": 3}


@pytest.mark.parametrize("kind", ["inputs", "gradients"])
def test_what_is_measured_has_to_be_finite(kind):
    model, name = tiny.model("llama"), "model.layers.0.self_attn.q_proj"
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.fill_(float("inf"))
    with pytest.raises(UserError, match=rf"{name}.*{kind} of this layer are not finite"):
        measured(kind, model, Rows(3), [name], [0, 1])


def test_corda_adds_no_more_to_c_than_its_inverse_needs():
    C = torch.diag(torch.linspace(1, 3, 8))
    kept, inverse = corda._damped(C.double())
    assert torch.equal(kept, C.double())
    assert distance(kept @ inverse, torch.eye(8)) < 1e-12


# ---- lora_ga --------------------------------------------------------------------------------------------------------


def test_lora_ga_takes_the_leading_singular_vectors_of_the_true_gradient():
    rows = Rows(8)
    run = training({"init": "lora_ga"}, rows=rows)
    plain = tiny.model("llama")
    total, tokens = torch.zeros(()), 0
    for number in run.rows(0):
        x = torch.tensor([rows[number].input_ids])
        total = total + nn.functional.cross_entropy(plain(x).logits[0, :-1], x[0, 1:], reduction="sum")
        tokens += x.shape[1] - 1
    checked = 0
    for name, delta in run.adapter.deltas.items():
        weight = plain.get_submodule(name).weight
        U, values, Vt = spectrum(torch.autograd.grad(total / tokens, weight, retain_graph=True)[0])
        if values[R - 1] < 1.05 * values[R] or values[2 * R - 1] < 1.05 * values[2 * R]:
            continue  # directions that are nearly alike are told apart by rounding
        checked += 1
        assert angle(delta.A, Vt[:R]) < 1e-3
        assert angle(delta.B.t(), U[:, R : 2 * R].t()) < 1e-3
        size = weight.shape[0] ** 0.25 / 16**0.5
        assert distance(delta.A.detach().norm(dim=1), torch.full((R,), size)) < 1e-5
        assert distance(delta.B.detach().norm(dim=0), torch.full((R,), size)) < 1e-5
    assert checked


@pytest.mark.parametrize(("kind", "shape"), KINDS)
def test_the_first_step_of_lora_ga_is_the_best_of_rank_2r_and_better_than_that_of_lora(kind, shape):
    """With A from the first r directions and B from the next, ΔW of a step of SGD is −G as far as 2r directions go."""
    base, G = base_of(kind, shape), torch.randn(shape)

    def cosine(delta: LowRank) -> float:
        A, B = delta.A.detach().double(), delta.B.detach().double()
        step = -(B @ (B.t() @ G.double()) + G.double() @ A.t() @ A)  # s²·η = 1, to first order in η
        return (-(step * G).sum() / step.norm() / G.norm()).item()

    values = spectrum(G)[1]
    best = (values[: 2 * R].square().sum() / values.square().sum()).sqrt().item()
    found = cosine(started("lora_ga", base, G))
    assert found == pytest.approx(best, rel=1e-5)
    assert found > cosine(started("kaiming", base)) + 0.1


# ---- PEFT ----------------------------------------------------------------------------------------------------------

peft = pytest.importorskip("peft")


def by_peft(kind: str, init: str, alpha: float):
    """PEFT's start on the same base: the model, and A and B by layer."""
    targets = {"llama": "all-linear", "gpt2": ["c_attn", "c_proj", "c_fc"]}[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT about what it was asked for
        config = peft.LoraConfig(
            r=R,
            lora_alpha=alpha,
            target_modules=targets,
            init_lora_weights=init,
            fan_in_fan_out=kind == "gpt2",
        )
        made = peft.get_peft_model(tiny.model(kind), config).eval()
    layers = {
        name: module for name, module in made.base_model.model.named_modules() if hasattr(module, "lora_A")
    }
    return made, {
        name: (m.lora_A["default"].weight, m.lora_B["default"].weight) for name, m in layers.items()
    }


def up_to_signs(found: Tensor, expected: Tensor) -> float:
    """Distance of rows of which each may be turned round."""
    signs = (found * expected).sum(1).sign()
    return distance(signs[:, None] * found.detach(), expected.detach())


@pytest.mark.oracle
@pytest.mark.parametrize("alpha", [4.0, 11.0])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_pissa_is_pefts_up_to_a_sign_of_each_component(kind, alpha):
    model, adapter = on(kind, init="pissa", alpha=alpha)
    made, theirs = by_peft(kind, "pissa", alpha)
    assert theirs.keys() == adapter.deltas.keys()
    for name, (A, B) in theirs.items():
        delta = adapter.deltas[name]
        assert up_to_signs(delta.A, A) < 1e-4
        assert up_to_signs(delta.B.t(), B.t()) < 1e-4
        assert distance(delta.B.detach() @ delta.A.detach(), B.detach() @ A.detach()) < 1e-5
        assert delta.scale == alpha / R
    x = ids()
    assert distance(model(x).logits, made(x).logits) < 5e-6


@pytest.mark.oracle
def test_olora_is_pefts_where_peft_is_right():
    """On a Linear; of a Conv1D PEFT decomposes the transpose."""
    _, adapter = on("llama", init="olora", alpha=8.0)
    for name, (A, B) in by_peft("llama", "olora", 8.0)[1].items():
        assert distance(adapter.deltas[name].A.detach(), A.detach()) < 1e-5
        assert distance(adapter.deltas[name].B.detach(), B.detach()) < 1e-5
