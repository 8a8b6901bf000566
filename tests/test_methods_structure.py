"""What ΔW is made of, against float64 definitions and autograd: cores, blocks, Hadamard, Kronecker, tensor trains."""

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.pytorch_utils import Conv1D

from lora_cli import model as models
from lora_cli import parts
from lora_cli.adapter import dense, files, inject, plan
from lora_cli.adapter.base import Base
from lora_cli.adapter.delta import Delta, Place
from lora_cli.adapter.plan import view_of
from lora_cli.adapter.portable import as_lora
from lora_cli.adapter.start import Start
from lora_cli.errors import UserError
from lora_cli.methods.delta import lokr, loretta
from lora_cli.parts import Part
from lora_cli.recipe.schema import AdapterRecipe
from lora_cli.train import loop
from tests import tiny
from tests.adapters import ids, put_on
from tests.training import (
    distance,
    fresh,
    gradients,
    loss_of,
    originals,
    plain,
    rank_of,
    training,
)

IN, OUT, R, S = 24, 36, 4, 0.7
KINDS = ("linear", "conv1d")
MIDDLES = {"trilora": ("E",), "flora_core": ("C",), "lora_xs": ("C",), "deep_lora": ("C1", "C2", "C3")}
"""Method -> what stands between B and A."""
OWN = ("loha", "lokr", "melora", "loretta")
"""Deltas that are no B·A."""


@pytest.fixture(autouse=True)
def _other_numbers_in_every_session():
    torch.manual_seed(random.getrandbits(48))


def base_of(kind: str = "linear", in_features: int = IN, out_features: int = OUT) -> Base:
    module = nn.Linear(in_features, out_features) if kind == "linear" else Conv1D(out_features, in_features)
    for parameter in module.parameters():
        parameter.data.normal_(0, in_features**-0.5)
    view = view_of(module.requires_grad_(False))
    assert view is not None
    return view[1]


def made(delta: str, base: Base, r: int = R, **settings: Any) -> Delta:
    """A delta at its own start."""
    found = parts.load("delta", delta).make(
        Place(base, r, S), **parts.settings("delta", Part(delta, settings))
    )
    with torch.no_grad():
        found.start(fresh())
    return found


def randomised(delta: Delta) -> Delta:
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.normal_()
    return delta


def wide(delta: Delta) -> dict[str, Tensor]:
    """Its tensors in float64."""
    return {key: parameter.detach().double() for key, parameter in delta.named_parameters()}


def randomise_trained(run: loop.Training, size: float = 0.1) -> None:
    with torch.no_grad():
        for parameter in run.adapter.trainable().values():
            parameter.normal_(std=size)


def short(method: str) -> dict[str, Any]:
    """A recipe's adapter, with few rows to measure."""
    measured = {"deep_lora": {"init": {"gradient_frame": {"rows": 4}}}}
    return {"method": method, **measured.get(method, {})}


# ---- what stands between B and A -------------------------------------------------------------------------------


def middle(found: dict[str, Tensor]) -> Tensor:
    """[r, r] of whatever a delta has between B and A."""
    if "E" in found:
        return torch.diag(found["E"])
    return found["C"] if "C" in found else found["C3"] @ found["C2"] @ found["C1"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", MIDDLES)
def test_a_middle_has_the_first_gradient_alone_and_it_is_that_of_the_definition(method, kind):
    run = training(short(method), kind=kind, seed=random.getrandbits(30))
    G = gradients(run, plain(run), 0)
    loss_of(run, run.model, 0).backward()
    for name, delta in run.adapter.deltas.items():
        found = wide(delta)
        for key in MIDDLES[method]:
            found[key].requires_grad_()
        W = delta.scale * found["B"] @ middle(found) @ found["A"]
        (W * G[name]).sum().backward()
        for key in MIDDLES[method]:
            grad = delta.get_parameter(key).grad
            assert grad.norm() > 0
            assert distance(grad, found[key].grad) < 1e-4, (name, key)
        others = [p.grad for key, p in delta.named_parameters() if key not in MIDDLES[method]]
        # Deep LoRA is not zero at first, but zero to rounding.
        assert all(grad is None or not torch.count_nonzero(grad) for grad in others)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", MIDDLES)
def test_a_middle_starts_at_the_base_and_w_is_the_definition(method, kind):
    run = training(short(method), kind=kind)
    x = ids()
    with torch.no_grad():
        live = run.model.eval()(x).logits
        with inject.without_adapters(run.adapter):
            assert distance(live, run.model(x).logits) < 1e-6
    randomise_trained(run)
    for delta in run.adapter.deltas.values():
        found = wide(delta)
        expected = delta.scale * found["B"] @ middle(found) @ found["A"]
        assert distance(delta.weight(), expected) < 1e-5


@pytest.mark.parametrize("method", MIDDLES)
def test_a_middle_is_saved_as_lora_of_the_same_rank_for_the_original_base(method, tmp_path):
    run = training(short(method), {"learning_rate": 2e-2, "max_steps": 6})
    list(loop.train_steps(run))
    exact = as_lora(run.adapter)
    assert exact is not None
    assert {spec.r for spec in exact.plan.layers} == {4}
    files.save(tmp_path, run.adapter, "the/base", None)
    original, x = tiny.model("llama"), ids()
    before = original(x).logits
    put_on(original, tmp_path)
    live = run.model.eval()(x).logits
    assert distance(original(x).logits, live) < 1e-5
    assert distance(before, live) > 1e-4


def test_a_core_that_is_diagonal_is_gates():
    base, x = base_of(), torch.randn(7, IN)
    gated, core = (made(name, base) for name in ("gated", "core"))
    with torch.no_grad():
        for key, parameter in gated.named_parameters():
            parameter.normal_()
            (core.C if key == "E" else core.get_parameter(key)).copy_(
                parameter.diag() if key == "E" else parameter
            )
    y = torch.zeros(7, OUT)
    torch.testing.assert_close(gated.add_to(y, x), core.add_to(y, x), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_lora_xs_trains_r_squared_numbers_a_layer_in_a_frame_that_stays(kind):
    run = training({"method": "lora_xs"}, {"learning_rate": 5e-2, "max_steps": 4}, kind=kind)
    layers = run.adapter.plan.layers
    assert sum(p.numel() for p in run.adapter.trainable().values()) == 16 * len(layers)
    assert run.adapter.plan.num_trainable == 16 * len(layers)
    before = {name: tensor.clone() for name, tensor in inject.tensors_of(run.adapter).items()}
    list(loop.train_steps(run))
    after = inject.tensors_of(run.adapter)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(run.adapter.trainable())
    assert all(name.endswith(".C") for name in changed)
    for name, W0 in originals(run).items():
        delta = run.adapter.deltas[name]
        B, A = delta.B.detach().double(), delta.A.detach().double()
        left = torch.linalg.svdvals(W0)[4:].square().sum()
        assert torch.linalg.norm(W0 - B @ A).square().item() == pytest.approx(left.item(), rel=1e-4)
        torch.testing.assert_close(B.t() @ B, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-5)


def test_the_authors_start_of_lora_xs_is_near_the_base():
    init = {"svd_of_w": {"std": 1e-5}}
    run = training({"method": "lora_xs", "init": init, "alpha": 4.0})
    assert all(0 < delta.get_parameter("C").std() < 3e-5 for delta in run.adapter.deltas.values())
    x = ids()
    live = run.model.eval()(x).logits
    with inject.without_adapters(run.adapter):
        change = (live - run.model(x).logits).abs().max().item()
    assert 0 < change < 1e-3


@pytest.mark.parametrize("size", [1e-3, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_deep_lora_starts_at_the_third_power_of_a_core_along_the_gradient(kind, size):
    base, G = base_of(kind), torch.randn(OUT, IN)
    delta = parts.load("delta", "deep").make(Place(base, R, S))
    with torch.no_grad():
        parts.load("init", "gradient_frame").init(delta, Start(base, fresh(), G), size=size, rows=1)
    values = torch.linalg.svdvals(delta.weight().double())
    assert values[:R].tolist() == pytest.approx([S * size**3] * R, rel=1e-4)
    A, B = delta.A.detach().double(), delta.B.detach().double()
    eye = torch.eye(R, dtype=torch.float64)
    torch.testing.assert_close(A @ A.t(), eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(B.t() @ B, eye, rtol=0, atol=1e-5)
    leading = torch.linalg.svdvals(G.double())[:R]
    torch.testing.assert_close((B.t() @ G.double() @ A.t()).diagonal(), leading, rtol=1e-4, atol=0)


# ---- own forms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", OWN)
def test_a_form_starts_at_the_base_and_trains_as_many_numbers_as_planned(method, kind):
    run = training({"method": method}, kind=kind)
    x = ids()
    with torch.no_grad():
        live = run.model.eval()(x).logits
        with inject.without_adapters(run.adapter):
            assert torch.equal(live, run.model(x).logits)
    trained = sum(p.numel() for p in run.adapter.trainable().values())
    assert run.adapter.plan.num_trainable == trained
    sides = sum(spec.in_features + spec.out_features for spec in run.adapter.plan.layers)
    if method in ("loha", "melora"):
        assert trained == {"loha": 2, "melora": 1}[method] * 4 * sides


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", OWN)
def test_gradients_are_those_of_the_definition(method, kind):
    run = training({"method": method}, kind=kind, seed=random.getrandbits(30))
    randomise_trained(run, 0.3)
    model = plain(run)
    for name, layer in run.adapter.layers.items():
        model.get_parameter(f"{name}.weight").data.copy_(layer.base.oriented(layer.merged_weight()))
    G = gradients(run, model, 0)
    loss_of(run, run.model, 0).backward()
    for name, delta in run.adapter.deltas.items():
        found = {key: p.requires_grad_() for key, p in wide(delta).items()}
        (definition(method, found, delta.scale) * G[name]).sum().backward()
        for key, parameter in delta.named_parameters():
            assert distance(parameter.grad, found[key].grad) < 2e-3, (name, key)


@pytest.mark.parametrize("method", OWN)
def test_nothing_as_large_as_w_but_w_is_kept_for_the_backward_pass(method):
    run = training({"method": method, "r": 2}, seed=random.getrandbits(30))
    randomise_trained(run, 0.3)
    sizes = {spec.in_features * spec.out_features for spec in run.adapter.plan.layers}
    W0 = {layer.base_layer.weight.data_ptr() for layer in run.adapter.layers.values()}
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        logits = run.model(torch.randint(5, tiny.VOCABULARY, (1, 5))).logits
    assert len(kept) > 10
    assert not [each.shape for each in kept if each.numel() in sizes and each.data_ptr() not in W0]
    logits.sum().backward()


def definition(method: str, found: dict[str, Tensor], scale: float) -> Tensor:
    """ΔW [out, in] from its tensors, by another way than the code's."""
    if method == "loha":
        first, second = (torch.einsum("or,ri->oi", found[f"B{n}"], found[f"A{n}"]) for n in (1, 2))
        return scale * first * second
    if method == "lokr":
        W2 = found["W2"] if "W2" in found else found["B2"] @ found["A2"]
        return scale * torch.kron(found["W1"], W2)
    if method == "melora":
        blocks = zip(found["B"].chunk(4, 0), found["A"].chunk(4, 1), strict=True)
        return scale * torch.block_diag(*(B @ A for B, A in blocks))
    A, B = (train(found, factor) for factor in "AB")
    return scale * B.flatten(0, -2) @ A.flatten(1)


def train(found: dict[str, Tensor], factor: str) -> Tensor:
    """Σ over the bonds of G0[·, n0, a]·G1[a, n1, b]·… by one einsum, [n0, n1, …]."""
    cores = [found[key] for key in sorted(found) if key[0] == factor]
    bonds = list(range(30, 31 + len(cores)))
    operands = [(core, [bonds[i], i, bonds[i + 1]]) for i, core in enumerate(cores)]
    return torch.einsum(*(each for pair in operands for each in pair), list(range(len(cores))))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", OWN)
def test_w_is_the_definition(method, kind):
    delta = randomised(made(method, base_of(kind)))
    assert distance(delta.weight(), definition(method, wide(delta), S)) < 1e-5


# ---- loha --------------------------------------------------------------------------------------------------------


def test_the_rank_of_loha_is_r_squared():
    for r in (2, 3):
        assert rank_of(randomised(made("loha", base_of(), r)).weight()) == r * r


def test_loha_has_factors_while_r_squared_is_less_than_both_sides():
    thin, thick = (randomised(made("loha", base_of(), r)) for r in (4, 5))
    B, A = thin.factors()
    assert B.shape == (OUT, 16)
    assert distance(B @ A, thin.weight()) < 1e-5
    assert thick.factors() is None


def test_the_backward_pass_of_loha_is_that_of_numbers():
    delta = randomised(made("loha", base_of(in_features=5, out_features=6), 2)).double()
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    tensors = [p.detach().requires_grad_() for p in delta.tensors()]
    assert torch.autograd.gradcheck(lambda x, *each: dense._apply(x, delta.made, S, *each), (x, *tensors))


def test_what_loha_saves_is_its_four_factors_and_export_as_lora_computes_the_same(tmp_path):
    run = training({"method": "loha", "r": 2}, {"learning_rate": 2e-2, "max_steps": 5})
    list(loop.train_steps(run))
    files.save(tmp_path, run.adapter, "the/base", None)
    saved = files.read(tmp_path)
    assert sum(t.numel() for t in saved.tensors.values()) == run.adapter.plan.num_trainable
    original, x = tiny.model("llama"), ids()
    loaded = put_on(original, tmp_path)
    live = run.model.eval()(x).logits
    assert torch.equal(original(x).logits, live)
    exact = as_lora(loaded)
    assert exact is not None
    assert {spec.r for spec in exact.plan.layers} == {4}
    loaded.deactivate()
    (tmp_path / "lora").mkdir()
    files.write(tmp_path / "lora", exact, original, "the/base", None, (), None)
    put_on(original, tmp_path / "lora")
    assert distance(original(x).logits, live) < 1e-5


# ---- lokr --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7, 12, 36, 48, 60, 576, 1536, 4096, 11008])
def test_a_side_is_split_where_its_factors_are_nearest(size):
    small = lokr.smaller(size, None)
    pairs = [(d, size // d) for d in range(1, size + 1) if size % d == 0 and d <= size // d]
    assert (small, size // small) == min(pairs, key=lambda pair: pair[1] - pair[0])
    assert lokr.smaller(size, 4) <= 4
    assert size % lokr.smaller(size, 4) == 0


@pytest.mark.parametrize(
    ("r", "factor", "thin"), [(1, None, True), (2, None, True), (9, None, False), (4, 2, True)]
)
def test_the_second_matrix_of_lokr_is_thin_where_that_is_smaller(r, factor, thin):
    delta = randomised(made("lokr", base_of(), r, factor=factor))
    assert ("W2" not in dict(delta.named_parameters())) == thin
    factors = delta.factors()
    if factors is not None:
        assert factors[0].shape[1] < min(IN, OUT)
        assert distance(factors[0] @ factors[1], delta.weight()) < 1e-5
    assert (factors is None) == (not thin or min(delta.get_parameter("W1").shape) * r >= min(IN, OUT))


# ---- melora ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 4])
def test_melora_has_n_times_the_rank_after_a_step_and_nothing_beside_its_blocks(n):
    run = training(
        {"method": "melora", "r": 2, "delta": {"melora": {"n": n}}},
        {"learning_rate": 0.5, "max_steps": 1, "optimizer": "sgd"},
    )
    list(loop.train_steps(run))
    for delta in run.adapter.deltas.values():
        W = delta.weight()
        assert rank_of(W) == 2 * n
        share = torch.block_diag(*[torch.ones(W.shape[0] // n, W.shape[1] // n)] * n)
        assert not torch.count_nonzero(W * (1 - share))
        assert torch.count_nonzero(W * share) == share.sum()


def test_a_block_of_melora_starts_as_a_lora_on_its_share_of_the_inputs():
    A = made("melora", base_of(in_features=400, out_features=40), 64, n=4).get_parameter("A")
    assert A.abs().max() <= 0.1
    assert A.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.03)


def test_melora_of_one_block_is_lora():
    base, x = base_of(), torch.randn(7, IN)
    delta, lora = (
        randomised(made("melora", base, n=1)),
        parts.load("delta", "lowrank").make(Place(base, R, S)),
    )
    lora.load_state_dict(delta.state_dict())
    y = torch.zeros(7, OUT)
    assert torch.equal(delta.add_to(y, x), lora.add_to(y, x))


# ---- loretta -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 17, 12, 576, 1536, 4096, 11008, 49152])
def test_a_side_is_split_into_small_factors(size):
    found = loretta.split(size)
    assert math.prod(found) == size
    primes = [each for each in found if each > loretta.LARGEST]
    assert all(all(p % d for d in range(2, loretta.LARGEST + 1)) for p in primes)


@pytest.mark.parametrize("bond", [1, 5])
def test_loretta_starts_with_the_spread_of_loras_a(bond):
    spreads = [
        made("loretta", base_of(in_features=576, out_features=36), 8, bond=bond).down().std().item()
        for _ in range(30)
    ]
    assert (sum(s * s for s in spreads) / 30) ** 0.5 == pytest.approx((3 * 576) ** -0.5, rel=0.35)


def test_the_numbers_of_loretta_grow_slowly():
    def numbers(side: int) -> int:
        return sum(map(math.prod, loretta.shapes(side, side, 16, 5).values()))

    assert numbers(4096) < 16 * 2 * 4096 / 40
    assert numbers(4096) < 2 * numbers(256)


# ---- what does not fit -------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "blocks that do not divide": (
        {"method": "melora", "delta": {"melora": {"n": 3}}},
        r"q_proj \(32×32\): n = 3 has to divide both sides",
    ),
    "two pairs, A frozen": ({"method": "loha", "trainable": "lora_fa"}, "two pairs of factors"),
    "another start": ({"method": "lokr", "init": "kaiming"}, r"\(delta: lokr\): needs init.own"),
    "a table": ({"method": "loha", "target_modules": ("embed_tokens",)}, "base.embedding: a table"),
    "a core of zeros beside a zero": ({"delta": "core"}, "delta: core: needs init.closed or init.svd_of_w"),
    "nothing between": ({"trainable": "only_core"}, "trainable: only_core: needs delta.core or delta.gated"),
    "importance without gradients": ({"method": "adalora", "trainable": "only_core"}, "rank: adalora"),
    "a frame that trains": ({"method": "deep_lora", "trainable": "lora_fa"}, "frozen anyway"),
}


@pytest.mark.parametrize(("adapter", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused_before_there_are_weights(adapter, reason):
    with torch.device("meta"):
        skeleton = tiny.model("llama")
    recipe = AdapterRecipe.model_validate({"r": 4, **adapter})
    with pytest.raises(UserError, match=reason):
        plan.make(recipe, skeleton, models.ends_of(skeleton))
