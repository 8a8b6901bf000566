"""Several experts on one layer: what the router decides, and that nothing stands for it but the adapter itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_cli import parts
from lora_cli.adapter import files
from lora_cli.adapter.delta import LowRank, Place
from lora_cli.adapter.plan import view_of
from lora_cli.adapter.routed import Routed
from lora_cli.adapter.seed import generator_of
from lora_cli.adapter.start import Start
from lora_cli.errors import ExitCode, UserError
from lora_cli.run.export import export
from lora_cli.run.merge import merge
from lora_cli.screen import Screen
from lora_cli.train.loop import Training, train_steps
from tests import tiny
from tests.adapters import adapted, ids, put_on
from tests.training import Rows, batch_of, fresh, kept_in_the_shape_of_w, training

IN, OUT, R = 12, 20, 4
METHODS: dict[str, dict[str, Any]] = {
    "hydra_lora": {},
    "molora": {"delta": {"experts": {"count": 3}}},
    "mov": {"alpha": None},
    "malora": {"delta": {"malora": {"count": 3}}},
    "mixlora_moe": {"delta": {"ffn_experts": {"count": 5}}},
    "mixlora": {"r": 3},
}


def delta_of(name: str, p: float = 0.0, **settings: Any) -> Routed:
    """Every tensor random, on a layer with a bias."""
    generator = fresh()
    base = view_of(nn.Linear(IN, OUT))[1]
    dropout = parts.load("dropout", "standard").make(p=p)
    settings = {**parts.settings("delta", parts.Part(name)), **settings}
    made = parts.load("delta", name).make(Place(base, R, 0.7, dropout), **settings)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made


@pytest.mark.parametrize("top", [1, 2, 4])
def test_every_token_is_given_its_best_experts_and_weights_that_add_up_to_one(top):
    made, x = delta_of("malora", count=5, top=top), torch.randn(40, IN)
    gates, whole = made.gates(x), (x @ made.router.t()).softmax(-1)
    assert (gates > 0).sum(-1).eq(top).all()
    torch.testing.assert_close(gates.sum(-1), torch.ones(40))
    best = whole.sort(-1, descending=True)
    expected = torch.zeros(40, 5).scatter(-1, best.indices[:, :top], best.values[:, :top])
    torch.testing.assert_close(gates, expected / expected.sum(-1, keepdim=True))


def test_a_token_with_one_expert_is_computed_by_plain_lora():
    made, x = delta_of("malora", count=3, top=1), torch.randn(50, IN)
    chosen = made.gates(x).argmax(-1)
    assert len(set(chosen.tolist())) > 1
    y = made.add_to(torch.zeros(50, OUT), x)
    for number in range(3):
        plain = LowRank(Place(view_of(nn.Linear(IN, OUT))[1], R, 0.7))
        with torch.no_grad():
            plain.A.copy_(made.P[number * R : (number + 1) * R] @ made.S)
            plain.B.copy_(made.B[:, number * R : (number + 1) * R])
        mine = chosen == number
        torch.testing.assert_close(y[mine], plain.add_to(torch.zeros(50, OUT), x)[mine], rtol=1e-4, atol=1e-4)


def test_equal_heads_are_plain_lora_whatever_the_router_says():
    made, x = delta_of("hydra", count=3), torch.randn(7, IN)
    with torch.no_grad():
        made.B.copy_(made.B[:, :R].repeat(1, 3))
    expected = 0.7 * x @ made.A.t() @ made.B[:, :R].t()
    torch.testing.assert_close(made.add_to(torch.zeros(7, OUT), x), expected, rtol=1e-4, atol=1e-4)


def test_vectors_stretch_what_the_layer_multiplies_and_not_its_bias():
    made, x = delta_of("mov"), torch.randn(7, IN)
    stretched = 1 + 0.7 * made.gates(x) @ made.V.t()
    expected = stretched * (x @ made.base.module.weight.t()) + made.base.bias
    torch.testing.assert_close(made.beside(made.base, x, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["hydra", "experts", "malora"])
def test_the_router_sees_what_is_dropped_from_the_experts(name):
    made, x = delta_of(name, p=0.9), torch.randn(30, IN)
    base = made_base()
    whole = made.gates(x)
    for compute in (
        lambda x: made.add_to(torch.zeros(30, OUT), x),
        lambda x: made.beside(base, x, made.dropped(x)) - base.module(x),
    ):
        torch.manual_seed(3)
        found = compute(x)
        torch.manual_seed(3)
        expected = made.mix(torch.zeros(30, OUT), made.dropped(x), whole)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_router_of_zeros_would_never_tell_the_heads_apart():
    """Why the start draws it: all heads have one gradient, and the router none."""
    made, x = delta_of("hydra", count=3), torch.randn(30, IN)
    with torch.no_grad():
        made.B.zero_()
        made.router.zero_()
    made.add_to(torch.zeros(30, OUT), x).square().sub(1).sum().backward()
    (made.add_to(torch.zeros(30, OUT), x) - 1).square().sum().backward()
    heads = made.B.grad.chunk(3, 1)
    torch.testing.assert_close(heads[0], heads[1])
    assert torch.count_nonzero(made.router.grad) == 0
    parts.load("init", "own").init(made, Start(made_base(), generator_of(0, "x")))
    (made.add_to(torch.zeros(30, OUT), x) - 1).square().sum().backward()
    heads = made.B.grad.chunk(3, 1)
    assert not torch.allclose(heads[0], heads[1])


def made_base() -> Any:
    return view_of(nn.Linear(IN, OUT))[1]


@pytest.mark.parametrize("method", METHODS)
def test_nothing_as_large_as_w_is_kept_for_the_backward_pass(method):
    model, adapter = adapted("llama", method=method, **METHODS[method])
    own = {id(layer.base_layer.weight) for layer in adapter.layers.values()}
    kept = kept_in_the_shape_of_w(model, adapter, ids())
    assert all(id(tensor) in own or tensor.data_ptr() in pointers(adapter) for tensor in kept)


def pointers(adapter: Any) -> set[int]:
    return {layer.base_layer.weight.data_ptr() for layer in adapter.layers.values()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_saved_adapter_comes_back_to_the_bit(method, kind, tmp_path):
    model, adapter = adapted(kind, method=method, **METHODS[method])
    x = ids()
    expected = model(x).logits
    files.save(tmp_path, adapter, "the/base", None)
    assert json.loads((tmp_path / files.CONFIG).read_text())["peft_type"] == "LORA_CLI"
    again = tiny.model(kind)
    put_on(again, tmp_path)
    assert torch.equal(again(x).logits, expected)


@pytest.mark.parametrize("method", METHODS)
def test_merging_and_exporting_are_refused_before_a_base_is_looked_for(method, tmp_path):
    _, adapter = adapted("llama", method=method, **METHODS[method])
    (tmp_path / "a").mkdir()
    files.save(tmp_path / "a", adapter, "there/is/no/such/base", None)
    for command in (
        lambda out: merge(tmp_path / "a", out, None, Screen()),
        lambda out: export(tmp_path / "a", "peft", out, Screen()),
    ):
        with pytest.raises(UserError, match="depends on the input") as error:
            command(tmp_path / "out")
        assert "lora generate" in error.value.fix
        assert error.value.code is ExitCode.MODEL
        assert method in error.value.what
        assert not Path(tmp_path / "out").exists()


# ---- whole MLPs as experts ------------------------------------------------------------------------------------------


def mlp_by_hand(model: Any, adapter: Any, block: int, x: torch.Tensor) -> torch.Tensor:
    """Y = Σ g_n(x)·MLP_n(x) in float64, each expert with merged weights of its own, the `top` best ones of a token."""
    kind = "mlp.c_fc" if hasattr(model, "transformer") else "mlp.gate_proj"
    found = {
        name.rpartition(".")[2]: layer for name, layer in adapter.layers.items() if f".{block}.mlp." in name
    }
    closing = found["c_proj"] if kind.endswith("c_fc") else found["down_proj"]
    router, count = closing.delta.router.detach().double(), closing.delta.count
    scores = x @ router.t()

    def expert(name: str, number: int, z: torch.Tensor) -> torch.Tensor:
        layer = found[name]
        A = layer.delta.A.detach().double().chunk(count)[number]
        B = layer.delta.B.detach().double().chunk(count, 1)[number]
        W = layer.base.weight().double() + layer.delta.scale * B @ A
        bias = layer.base.bias
        return z @ W.t() + (0 if bias is None else bias.double())

    def whole(number: int) -> torch.Tensor:
        if kind.endswith("c_fc"):
            return expert("c_proj", number, nn.functional.gelu(expert("c_fc", number, x), approximate="tanh"))
        gated = nn.functional.silu(expert("gate_proj", number, x)) * expert("up_proj", number, x)
        return expert("down_proj", number, gated)

    y = torch.zeros_like(x)
    for row in range(len(x)):
        best = scores[row].topk(closing.delta.mlp.top)
        for weight, number in zip(best.values.softmax(0), best.indices.tolist(), strict=True):
            y[row] += weight * whole(number)[row]
    return y


@pytest.mark.parametrize("top", [2, 4])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_mlp_of_experts_is_the_weighted_sum_of_whole_mlps(kind, top):
    settings = {"count": 5, "top": top}
    model, adapter = adapted(kind, method="mixlora_moe", delta={"ffn_experts": settings}, size=0.3)
    block = (model.transformer.h if kind == "gpt2" else model.model.layers)[1]
    x = torch.randn(2, 4, 32, generator=fresh())
    expected = mlp_by_hand(model, adapter, 1, x.flatten(0, 1).double()).view(2, 4, 32)
    with torch.no_grad():
        torch.testing.assert_close(block.mlp(x).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        (("up_proj", "down_proj"), "gate_proj is left out"),
        (("q_proj", "k_proj", "v_proj", "o_proj"), "is no MLP"),
    ],
)
def test_layers_that_are_no_whole_mlp_are_refused(targets, told):
    with pytest.raises(UserError, match=told):
        adapted("llama", method="mixlora_moe", target_modules=targets)


def test_experts_train_the_same_with_recomputed_activations():
    found = []
    for checkpointed in (False, True):
        run = training(
            {"method": "mixlora_moe", "lifecycle": {"load_balance": {"weight": 0.5}}},
            {"gradient_checkpointing": checkpointed, "max_steps": 4, "micro_batch_size": 2},
            rows=ROWS,
        )
        losses = [report.loss for report in train_steps(run)]
        found.append((losses, {n: p.detach().clone() for n, p in run.adapter.trainable().items()}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for name, tensor in found[0][1].items():
        torch.testing.assert_close(tensor, found[1][1][name], rtol=1e-4, atol=1e-5)


# ---- the balance of loads -------------------------------------------------------------------------------------------

ROWS = Rows(16)


def balanced(micro: int | str, method: str = "malora", packing: bool = False, **train: Any) -> Training:
    """A run whose loss is nearly all balance."""
    run = training(
        {"method": method, "lifecycle": {"load_balance": {"weight": 3.0}}},
        {"micro_batch_size": micro, "batch_size": 8, "optimizer": "sgd", "learning_rate": 1.0, **train},
        rows=ROWS,
    )
    run.packing = packing
    return run


@pytest.mark.parametrize("method", ["malora", "mixlora_moe"])
def test_a_step_is_the_same_however_it_is_split_or_packed(method):
    found = []
    for micro, packing in ((8, False), (3, False), (1, False), (4, True)):
        run = balanced(micro, method, packing, max_steps=4)
        steps = list(train_steps(run))
        found.append((steps[-1].loss, run.lifecycles[-1].load, run.adapter.trainable()))
    for loss, load, tensors in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        assert torch.equal(load, found[0][1]), "a count is exact"
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, found[0][2][name], rtol=1e-3, atol=1e-5)


def test_what_is_added_is_the_balance_of_the_paper_with_the_loads_of_the_step_before():
    run = balanced("auto", max_steps=3, learning_rate=1e-3)
    list(train_steps(run))
    balance = run.lifecycles[-1]
    before = balance.load.clone()
    torch.testing.assert_close(before.sum(1), torch.ones(len(before), dtype=torch.float64))
    reports = run.train.model_copy(update={"max_steps": 4})
    run.train = reports
    batch = batch_of(run, run.step)
    balance.begin_step(run)
    run.model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    )
    real = batch.attention_mask.bool()
    expected, counts = 0.0, []
    for delta, load in zip(run.adapter.deltas.values(), before, strict=True):
        assert delta.ledger is not None
        P = delta.ledger.probabilities[real].double().mean(0)
        expected += 8 * (load * P).sum() / len(before)
        counts.append(delta.ledger.chosen[real].double().mean(0) / 2)
    found = balance.loss(run, batch)
    torch.testing.assert_close(found.double(), 3.0 * expected, rtol=1e-5, atol=0)
    balance.gradients(run)
    torch.testing.assert_close(balance.load, torch.stack(counts))


def test_balance_makes_the_loads_even():
    spread = []
    for weight in (1e-9, 3.0):
        run = training(
            {"method": "malora", "r": 2, "lifecycle": {"load_balance": {"weight": weight}}},
            {"max_steps": 40, "batch_size": 16, "learning_rate": 3e-3},
            rows=ROWS,
        )
        list(train_steps(run))
        spread.append(run.lifecycles[-1].load.std(1).mean().item())
    assert spread[1] < 0.6 * spread[0]


def test_the_balance_has_no_share_in_the_reported_loss():
    plain = training({"method": "malora", "lifecycle": ()}, {"batch_size": 8, "max_steps": 1}, rows=ROWS)
    found = [next(iter(train_steps(run))).loss for run in (balanced(4, max_steps=1), plain)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
