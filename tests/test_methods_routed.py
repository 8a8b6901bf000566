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
from tests import tiny
from tests.adapters import adapted, ids, put_on
from tests.training import fresh, kept_in_the_shape_of_w

IN, OUT, R = 12, 20, 4
ROUTED = ("hydra", "experts", "mov")
METHODS: dict[str, dict[str, Any]] = {
    "hydra_lora": {},
    "molora": {"delta": {"experts": {"count": 3, "top": 2}}},
    "mov": {"alpha": None},
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


@pytest.mark.parametrize("top", [1, 2, 5])
def test_every_token_is_given_its_best_experts_and_weights_that_add_up_to_one(top):
    made, x = delta_of("experts", count=5, top=top), torch.randn(40, IN)
    gates, whole = made.gates(x), (x @ made.router.t()).softmax(-1)
    assert (gates > 0).sum(-1).eq(top).all()
    torch.testing.assert_close(gates.sum(-1), torch.ones(40))
    best = whole.sort(-1, descending=True)
    expected = torch.zeros(40, 5).scatter(-1, best.indices[:, :top], best.values[:, :top])
    torch.testing.assert_close(gates, expected / expected.sum(-1, keepdim=True))


def test_a_token_with_one_expert_is_computed_by_plain_lora():
    made, x = delta_of("experts", count=3, top=1), torch.randn(50, IN)
    chosen = made.gates(x).argmax(-1)
    assert len(set(chosen.tolist())) > 1
    y = made.add_to(torch.zeros(50, OUT), x)
    for number in range(3):
        plain = LowRank(Place(view_of(nn.Linear(IN, OUT))[1], R, 0.7))
        with torch.no_grad():
            plain.A.copy_(made.A[number * R : (number + 1) * R])
            plain.B.copy_(made.B[:, number * R : (number + 1) * R])
        mine = chosen == number
        torch.testing.assert_close(y[mine], plain.add_to(torch.zeros(50, OUT), x)[mine], rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("name", ["hydra", "experts"])
def test_the_router_sees_what_is_dropped_from_the_experts(name):
    made, x = delta_of(name, p=0.9), torch.randn(30, IN)
    made.routes = []
    made.add_to(torch.zeros(30, OUT), x)
    made.beside(view_of(nn.Linear(IN, OUT))[1], x, made.dropped(x))
    expected = (x @ made.router.t()).softmax(-1)
    for routes in made.routes:
        torch.testing.assert_close(routes.probabilities, expected)
    assert len(made.routes) == 2


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
    parts.load("init", "routed").init(made, Start(made_base(), generator_of(0, "x")))
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
