"""Heads and channels that go while LoRA trains: what they count, how many go, and that nothing of them is left."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_cli.adapter import inject
from lora_cli.errors import ExitCode, UserError
from lora_cli.methods.lifecycle import loraprune
from lora_cli.train.loop import Training, train_steps
from tests.adapters import ids
from tests.training import Rows, distance, loss_of, originals, training

BOTH = pytest.mark.parametrize("kind", ["llama", "gpt2"])
WIDTH = 8
"""Of a head of the tiny models."""


def begun(kind: str = "llama", adapter: dict[str, Any] | None = None, **settings: Any) -> Training:
    """A run of 12 steps in which something goes in every second."""
    asked = {"share": 0.5, "begin": 0.2, "end": 0.8, "every": 2, **settings}
    return training(
        {"method": "loraprune", "lifecycle": {"loraprune": asked}, **(adapter or {})},
        {"max_steps": 12, "learning_rate": 0.01},
        kind=kind,
        rows=ROWS,
        **({"attention_bias": True, "mlp_bias": True} if kind == "llama" else {}),
    )


ROWS = Rows(24)


def randomised(run: Training) -> Training:
    for delta in run.adapter.deltas.values():
        nn.init.normal_(delta.get_parameter("B"), std=0.1)
    return run


def rows_and_columns(
    kind: str, block: int
) -> Iterator[tuple[str, list[dict[str, list[int]]], str, list[list[int]]]]:
    """For the attention and the MLP of a block, by hand: name, of each part its rows by layer, reader, its columns."""

    def span(first: int, count: int) -> list[int]:
        return list(range(first, first + count))

    if kind == "llama":  # two heads share their keys
        at = f"model.layers.{block}"
        queries = [span(g * 2 * WIDTH, 2 * WIDTH) for g in range(2)]
        keys = [span(g * WIDTH, WIDTH) for g in range(2)]
        rows = [
            {f"{at}.self_attn.q_proj": q, f"{at}.self_attn.k_proj": k, f"{at}.self_attn.v_proj": k}
            for q, k in zip(queries, keys, strict=True)
        ]
        yield f"{at}.self_attn", rows, f"{at}.self_attn.o_proj", queries
        channels = [{f"{at}.mlp.gate_proj": [c], f"{at}.mlp.up_proj": [c]} for c in range(48)]
        yield f"{at}.mlp", channels, f"{at}.mlp.down_proj", [[c] for c in range(48)]
    else:
        at = f"transformer.h.{block}"
        heads = [span(h * WIDTH, WIDTH) for h in range(4)]
        rows = [{f"{at}.attn.c_attn": h + [32 + c for c in h] + [64 + c for c in h]} for h in heads]
        yield f"{at}.attn", rows, f"{at}.attn.c_proj", heads
        yield (
            f"{at}.mlp",
            [{f"{at}.mlp.c_fc": [c]} for c in range(128)],
            f"{at}.mlp.c_proj",
            [[c] for c in range(128)],
        )


def by_hand(run: Training, kind: str) -> dict[str, list[float]]:
    """Importance in one step, in float64 from autograd's gradients of A and B, one head or channel at a time."""
    parameters = run.adapter.trainable()
    found = torch.autograd.grad(loss_of(run, run.model, run.step), list(parameters.values()))
    of = {name: g.double() for name, g in zip(parameters, found, strict=True)}
    entries: dict[str, Tensor] = {}
    for name, W0 in originals(run).items():
        delta = run.adapter.deltas[name]
        A, B = (delta.get_parameter(key).detach().double() for key in "AB")
        moved = B @ A - (B - of[f"{name}.B"]) @ (A - of[f"{name}.A"])
        entries[name] = ((W0 + delta.scale * B @ A) * moved).abs()
    scores: dict[str, list[float]] = {}
    for block in range(2):
        for unit, rows, reader, columns in rows_and_columns(kind, block):
            layers = [[entries[name][each[name]].sum() for each in rows] for name in rows[0]]
            layers.append([entries[reader][:, each].sum() for each in columns])
            normed = [torch.stack(each) / torch.linalg.norm(torch.stack(each)) for each in layers]
            scores[unit] = torch.stack(normed).sum(0).tolist()
    return scores


def k_of(run: Training) -> dict[str, Tensor]:
    return {name: delta.get_parameter("k").detach().clone() for name, delta in run.adapter.deltas.items()}


def gone(run: Training, kind: str, block: int) -> Iterator[tuple[str, list[int], int]]:
    """Of each attention and MLP the heads or channels that are gone; each is gone whole or not at all."""
    k = k_of(run)
    for unit, rows, reader, _ in rows_and_columns(kind, block):
        left = [torch.cat([k[name][each[name]] for name in each]) for each in rows]
        assert all(bool((each == each[0]).all()) for each in left)
        assert bool((k[reader] == 1).all())
        yield unit, [number for number, each in enumerate(left) if each[0] == 0], len(rows)


def test_the_estimate_is_what_a_plain_step_takes_off_the_product_and_to_first_order_its_gradient():
    run = randomised(begun())
    delta = next(iter(run.adapter.deltas.values()))
    A, B = (delta.get_parameter(key) for key in "AB")
    for size in (1.0, 1e-3):
        A.grad, B.grad = size * torch.randn_like(A), size * torch.randn_like(B)
        found = loraprune.estimated(delta)
        step = torch.optim.SGD([A, B], lr=1.0)
        with torch.no_grad():
            before, first_order = B @ A, B.grad @ A + B @ A.grad
        step.step()
        torch.testing.assert_close(found, (before - B @ A).detach(), rtol=1e-3, atol=1e-5)
    assert distance(found, first_order) < 0.1


@BOTH
def test_importance_is_its_definition_and_averaged_over_steps(kind):
    run = randomised(begun(kind, beta=0.75))
    lifecycle = run.lifecycles[1]
    assert isinstance(lifecycle, loraprune.LoRAPrune)
    mean: dict[str, Tensor] = {}
    steps = train_steps(run)
    for _ in range(2):
        for name, now in by_hand(run, kind).items():
            mean[name] = 0.75 * mean.get(name, 0.0) + 0.25 * torch.tensor(now)
        next(steps)
    assert mean.keys() == lifecycle.importance.keys()
    for name, expected in mean.items():
        torch.testing.assert_close(lifecycle.importance[name], expected, rtol=1e-3, atol=1e-5)


@BOTH
@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_of_every_attention_and_mlp_the_same_share_goes_along_a_cubic_the_least_important_for_good(
    kind, share
):
    run = begun(kind, share=share)
    lifecycle, before, counts = run.lifecycles[1], {}, dict[str, list[int]]()
    for report in train_steps(run):
        for block in range(2):
            for unit, numbers, count in gone(run, kind, block):
                counts.setdefault(unit, []).append(len(numbers))
                assert set(before.get(unit, ())) <= set(numbers)
                if len(numbers) > len(before.get(unit, ())):
                    scores, new = lifecycle.importance[unit], set(numbers) - set(before.get(unit, ()))
                    stays = set(range(count)) - set(numbers)
                    assert max(scores[list(new)]) <= min(scores[list(stays)])
                before[unit] = numbers
                # begins after step 2, ends with step 10, and acts in every second step between
                done = 0 if report.step <= 2 else min((report.step - report.step % 2 - 2) / 8, 1)
                assert len(numbers) == int(share * count * (1 - (1 - done) ** 3))
    assert all(series[-1] > 0 for unit, series in counts.items() if int(share * 2) or "mlp" in unit)


def cut(model: Any, kept: dict[str, Tensor]) -> Any:
    """A smaller Llama: the rows that stay, and the columns that read them."""
    state, smaller = dict(model.state_dict()), copy.deepcopy(model.config)
    for name, rows in kept.items():
        for key in (f"{name}.weight", f"{name}.bias"):
            state[key] = state[key][rows]
    for name, rows in kept.items():
        reader = {"q_proj": "o_proj", "gate_proj": "down_proj"}.get(name.rpartition(".")[2])
        if reader:
            key = f"{name.rpartition('.')[0]}.{reader}.weight"
            state[key] = state[key][:, rows]
    first = {name.rpartition(".")[2]: int(rows.sum()) for name, rows in kept.items()}
    smaller.num_attention_heads, smaller.num_key_value_heads = (
        first["q_proj"] // WIDTH,
        first["k_proj"] // WIDTH,
    )
    smaller.intermediate_size = first["gate_proj"]
    made = type(model)(smaller).eval()
    made.load_state_dict(state)
    return made


def test_the_model_that_is_saved_computes_what_a_smaller_one_does_without_what_is_gone():
    """Stock Llama of half the heads and half the channels, and its own code; biases included."""
    run = begun()
    list(train_steps(run))
    kept = {name: k > 0 for name, k in k_of(run).items() if not name.endswith(("o_proj", "down_proj"))}
    run.model.eval()
    x = ids()
    live = run.model(x).logits
    inject.merge(run.model, run.adapter)
    for name, rows in kept.items():
        layer = run.model.get_submodule(name)
        assert not layer.weight[~rows].count_nonzero()
        assert not layer.bias[~rows].count_nonzero()
    small = cut(run.model, kept)
    assert small.config.num_attention_heads == 2
    assert small.config.intermediate_size == 24
    torch.testing.assert_close(run.model(x).logits, live, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(small(x).logits, live, rtol=1e-4, atol=1e-4)


@BOTH
def test_nothing_reads_what_is_gone(kind):
    run = begun(kind)
    list(train_steps(run))
    parts = {unit: numbers for block in range(2) for unit, numbers, _ in gone(run, kind, block)}
    run.model.eval()
    inject.merge(run.model, run.adapter)
    x = ids()
    before = run.model(x).logits
    for block in range(2):
        for unit, _, reader, columns in rows_and_columns(kind, block):
            at = [column for number in parts[unit] for column in columns[number]]
            assert at
            W = run.model.get_submodule(reader).weight
            with torch.no_grad():
                (W if kind == "gpt2" else W.t())[at] = 100.0
    torch.testing.assert_close(run.model(x).logits, before, rtol=1e-4, atol=1e-4)


def test_blocks_that_are_not_adapted_are_spared():
    run = begun(adapter={"layers": (1,)})
    list(train_steps(run))
    assert {unit.split(".")[2] for unit in run.lifecycles[1].importance} == {"1"}
    assert all(name.startswith("model.layers.1.") for name in run.adapter.deltas)


def test_a_step_that_overflowed_is_not_counted():
    run = begun()
    lifecycle = run.lifecycles[1]
    for p in run.adapter.trainable().values():
        p.grad = torch.full_like(p, torch.inf)
    lifecycle.gradients(run)
    assert all(not mean.count_nonzero() for mean in lifecycle.importance.values())


@pytest.mark.parametrize(
    ("kind", "adapter", "told"),
    [
        ("llama", {"target_modules": ("o_proj", "down_proj")}, "no attention and no MLP of a known form"),
        ("llama", {"target_modules": ("q_proj", "k_proj")}, "no attention and no MLP of a known form"),
        ("llama", {"target_modules": ("embed_tokens", "up_proj")}, "base.embedding"),
    ],
)
def test_where_nothing_could_go_is_refused(kind, adapter, told):
    with pytest.raises(UserError, match=told):
        begun(kind, adapter)


def test_a_layer_that_is_not_as_large_as_its_name_says_is_refused():
    run = begun()
    run.model.config.num_key_value_heads = 4
    with pytest.raises(UserError, match=r"k_proj is not as large") as caught:
        loraprune.units_of(run.model, run.adapter.layers)
    assert caught.value.code is ExitCode.MODEL


@pytest.mark.parametrize("kind", ["phi3", "qwen3", "gemma2"])
def test_models_of_other_forms_are_pruned_too(kind):
    """Also where q, k and v are one layer, or gate and up: the order of the rows is that of the model."""
    run = training(
        {"method": "loraprune", "lifecycle": {"loraprune": {"every": 1}}},
        {"max_steps": 6},
        kind=kind,
        rows=ROWS,
    )
    list(train_steps(run))
    run.model.eval()
    x = ids()
    live = run.model(x).logits
    for name, unit in run.lifecycles[1].units.items():
        for layer, number in unit.rows.items():
            k = run.adapter.deltas[layer].get_parameter("k").detach()
            left = torch.zeros(unit.count).index_copy_(0, number, k)
            assert int(left.sum()) == unit.count - unit.count // 2, name
            assert torch.equal(left[number], k)
        assert unit.columns
        for layer, number in unit.columns.items():
            with torch.no_grad():
                run.model.get_submodule(layer).base_layer.weight[:, left[number] == 0] = 100.0
    for name, delta in run.adapter.deltas.items():
        if name.endswith("qkv_proj"):  # queries and keys of what has no values
            delta.get_parameter("k")[: -2 * WIDTH].fill_(1)
    torch.testing.assert_close(run.model(x).logits, live, rtol=1e-4, atol=1e-4)
