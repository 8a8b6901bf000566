"""Methods that change something between steps, and full fine-tuning, against formulas and hand-written loops.

Restarts (serial, relora, cola, xgblora, and what flora and galore do at one), delta_lora, full.
"""

import copy
import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_cli import model as models
from lora_cli import parts
from lora_cli.adapter import files, inject, plan, rules
from lora_cli.adapter.delta import LowRank
from lora_cli.adapter.portable import saved_form
from lora_cli.errors import UserError
from lora_cli.methods.lifecycle import restart
from lora_cli.recipe.schema import AdapterRecipe
from lora_cli.train import loop
from tests import tiny
from tests.adapters import put_on
from tests.training import (
    Rows,
    batch_of,
    distance,
    loss_of,
    originals,
    plain,
    rank_of,
    training,
    weights,
)

CONSTANT = {"lr_scheduler": "constant"}
BOTH = pytest.mark.parametrize("kind", ["llama", "gpt2"])


def seed() -> int:
    return random.getrandbits(30)


def restarts(every: int, **settings: Any) -> dict[str, Any]:
    return {"lifecycle": {"restart": {"every": every, **settings}}}


def logits(run: loop.Training, model: nn.Module, step: int = 0) -> Tensor:
    batch = batch_of(run, step)
    with torch.no_grad():
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits


def around_restarts(run: loop.Training, look: Callable[[], Any]) -> list[tuple[Any, Any]]:
    """Train to the end; what `look` returns before and after every restart."""
    (lifecycle,) = [each for each in run.lifecycles if isinstance(each, restart.Restart)]
    stepped, seen = lifecycle.stepped, []

    def spied(run_: loop.Training) -> None:
        before = look() if run.step % lifecycle.every == 0 else None
        stepped(run_)
        if before is not None and run.step < run.total_steps:
            seen.append((before, look()))

    lifecycle.stepped = spied
    list(loop.train_steps(run))
    return seen


# ---- a restart keeps the function -------------------------------------------------------------------------------


def starts_lora(name: str) -> bool:
    """Whether an init is one of plain LoRA over a plain base."""
    asks, refuses = (rules.stated(kind, "init", parts.Part(name)) for kind in ("needs", "forbids"))
    return not asks and not {"delta.lowrank", rules.MERGEABLE} & set(refuses)


STARTS = {name: {"init": name} for name in parts.names("init") if starts_lora(name)} | {
    "small": {"init": "small", "delta": "gated"},
    "two_sided": {"init": "random_projection", "delta": "two_sided"},
    "only_a": {"init": "galore", "trainable": "only_a"},
    "additive": {"method": "additive"},
    "miss": {"method": "miss"},
    "optimizer_view": {"combine": "optimizer_view"},
    "optimizer_view of galore": {"combine": "optimizer_view", "init": "galore"},
}


@pytest.mark.parametrize("start", STARTS)
def test_a_restart_keeps_the_function_whatever_it_starts_from(start):
    run = training({**STARTS[start], **restarts(2)}, {"learning_rate": 5e-3, "max_steps": 6}, seed=seed())
    base = logits(run, plain(run))

    seen = around_restarts(run, lambda: (logits(run, run.model), loss_of(run, run.model, 0).item()))
    assert len(seen) == 2
    for before, after in seen:
        assert distance(after[0], before[0]) <= 1e-5
        assert after[1] == pytest.approx(before[1], abs=1e-5)
        assert distance(before[0], base) > 1e-3
    assert all(len(pairs) == 2 for pairs in run.adapter.absorbed.values() if pairs is not None)


@pytest.mark.parametrize("method", ["vera", "full", "dora", "adalora"])
def test_what_cannot_start_anew_is_refused(method):
    model = tiny.model()
    with pytest.raises(UserError, match="cannot be combined with"):
        plan.make(AdapterRecipe(method=method, r=4, **restarts(2)), model, models.ends_of(model))


def test_a_restart_is_of_the_size_that_symmetric_asks_for():
    run = training(
        {"method": "symmetric", **restarts(2)}, {"learning_rate": 5e-3, "max_steps": 3}, seed=seed()
    )
    list(itertools.islice(loop.train_steps(run), 2))
    for layer in run.adapter.layers.values():
        product = layer.delta.scale * layer.delta.B @ layer.delta.A
        share = torch.linalg.norm(product) / torch.linalg.norm(layer.base.weight())
        assert share.item() == pytest.approx(0.05, rel=1e-4)


@pytest.mark.parametrize("method", ["serial", "relora", "cola"])
@BOTH
def test_the_rank_grows_with_every_restart(kind, method):
    """Rank of W_K − W0: more than r, at most K·r; the last piece is one of the K."""
    run = training(
        {"method": method, "r": 2, **restarts(3)},
        {"learning_rate": 1e-2, "max_steps": 9},
        kind=kind,
        seed=seed(),
    )
    W0 = originals(run)
    for report in loop.train_steps(run):
        pieces = math.ceil(report.step / 3)
        for name, W in weights(run).items():
            assert rank_of(W - W0[name], 1e-4) <= 2 * pieces
    assert all(rank_of(W - W0[name], 1e-4) > 2 for name, W in weights(run).items())


def test_a_restart_draws_other_factors_in_every_layer_and_piece():
    run = training({"method": "serial", **restarts(2)}, {"max_steps": 6})
    drawn = [delta.A.detach().flatten()[:60].clone() for delta in run.adapter.deltas.values()]

    def look() -> list[Tensor]:
        return [delta.A.detach().flatten()[:60].clone() for delta in run.adapter.deltas.values()]

    for _, after in around_restarts(run, look):
        drawn += after
    assert len({tuple(each.tolist()) for each in drawn}) == len(drawn) == 3 * len(run.adapter.layers)


# ---- what the optimizer remembers -------------------------------------------------------------------------------


def memory(run: loop.Training) -> dict[str, dict[str, Tensor]]:
    return {
        name: {key: value.clone() for key, value in run.optimizer.state.get(p, {}).items()}
        for name, p in run.adapter.trainable().items()
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("moments", [0.0, 1.0, 0.3, "carry"])
def test_a_restart_touches_what_adam_remembers_of_the_factors_only(moments):
    adapter = {"method": "flora", **restarts(2, moments=moments), "train_also": ("norms",)}
    run = training(adapter, {"max_steps": 6})
    seen = around_restarts(run, lambda: memory(run))
    assert len(seen) == 2
    for before, after in seen:
        for name in before:
            if name.startswith("also."):
                assert same(before[name], after[name]), name
                assert before[name]["exp_avg"].count_nonzero()
            elif moments == 0:
                assert before[name]
                assert not after[name], name
            else:
                assert same(before[name], after[name]) is (moments == 1), name


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_share_of_the_moments_is_kept_and_the_rest_is_zero(share):
    run = training(restarts(3, moments=share), {"max_steps": 9, "learning_rate": 1e-2})
    seen = around_restarts(run, lambda: memory(run))
    for before, after in seen:
        for key in ("exp_avg", "exp_avg_sq"):
            old = torch.cat([state[key].flatten() for state in before.values()])
            new = torch.cat([state[key].flatten() for state in after.values()])
            kept = new != 0
            assert torch.equal(new[kept], old[kept])
            spread = (share * (1 - share) / len(old)) ** 0.5
            assert kept.double().mean().item() == pytest.approx(share, abs=5 * spread)
    first, second = (after["model.layers.0.mlp.up_proj.B"]["exp_avg"] != 0 for _, after in seen)
    assert not torch.equal(first, second)


def test_to_keep_a_share_of_nothing_is_to_forget_to_the_bit():
    """Adam's count of steps starts anew with the averages: else it would take zeros for averages of many steps."""
    rows, number, found = Rows(), seed(), []
    for share in (0.0, 1e-12):
        run = training(restarts(4, moments=share), {"max_steps": 12}, rows=rows, seed=number)
        list(loop.train_steps(run))
        found.append(weights(run))
    assert all(torch.equal(W, found[1][name]) for name, W in found[0].items())


def test_after_a_restart_no_entry_moves_by_far_more_than_the_learning_rate():
    """As one would that kept its first moment without its second: A has no gradient while B is zero."""
    rate = 1e-3
    run = training(restarts(6, moments=0.1), {"max_steps": 7, "learning_rate": rate, **CONSTANT})

    def look() -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in run.adapter.trainable().items()}

    ((_, start),) = around_restarts(run, look)
    for name, parameter in look().items():
        moved = (parameter - start[name]).abs()
        assert 0 < moved.max() <= 2 * rate, name


def test_carry_takes_the_first_moment_of_flora_into_the_new_projection():
    """To m·A·A'ᵀ; all else that Adam remembers stays."""
    run = training(
        {"method": "flora", **restarts(3, moments="carry")},
        {"max_steps": 9, "learning_rate": 1e-2},
        seed=seed(),
    )

    def look() -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        return memory(run), {name: delta.A.detach().clone() for name, delta in run.adapter.deltas.items()}

    for (before, old), (after, new) in around_restarts(run, look):
        for layer in run.adapter.layers:
            then, now = before[f"{layer}.B"], after[f"{layer}.B"]
            assert not torch.equal(old[layer], new[layer])
            expected = then["exp_avg"].double() @ old[layer].double() @ new[layer].double().t()
            assert distance(now["exp_avg"], expected) <= 1e-6
            assert torch.equal(now["exp_avg_sq"], then["exp_avg_sq"])
            assert now["step"] == then["step"]


# ---- the learning rate --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "warmup"), [(5, 2), (4, 0), (3, 3), (2, 5)])
def test_the_learning_rate_is_the_schedule_warmed_up_anew_after_every_restart(every, warmup):
    run = training(
        {"method": "relora", "r": 4, **restarts(every, warmup=warmup)},
        {"learning_rate": 1e-2, "lr_scheduler": "cosine", "warmup_steps": 2, "max_steps": 13},
    )
    expected = []
    for step in range(13):
        rate = 1e-2 * ((step + 1) / 2 if step < 2 else (1 + math.cos(math.pi * (step - 2) / 11)) / 2)
        since = step % every
        expected.append(rate * ((since + 1) / (warmup + 1) if step >= every and since < warmup else 1))
    assert [report.learning_rate for report in loop.train_steps(run)] == pytest.approx(expected, rel=1e-12)


# ---- xgblora ------------------------------------------------------------------------------------------------------


@BOTH
def test_only_the_layers_of_a_booster_move(kind):
    run = training(
        {"method": "xgblora", "r": 1, **restarts(3, layers=3)},
        {"max_steps": 15, "learning_rate": 3e-2, "weight_decay": 0.1},
        kind=kind,
        seed=seed(),
    )
    W0, moved = weights(run), []
    before = W0
    for report in loop.train_steps(run):
        if report.step % 3 == 0:
            after = weights(run)
            moved.append({name for name in after if not torch.equal(after[name], before[name])})
            before = after
    assert [len(layers) for layers in moved] == [3] * 5
    assert len(set(map(frozenset, moved))) > 1
    for name, W in before.items():
        boosters = sum(name in layers for layers in moved)
        assert rank_of(W - W0[name], 1e-4) <= boosters
        assert (boosters > 0) == (not torch.equal(W, W0[name]))


def test_the_boosters_follow_from_the_seed():
    rows, number, found = Rows(), seed(), []
    for start in (5, 5, 6):
        run = training(
            {"method": "xgblora", "r": 1, **restarts(2, layers=3)},
            {"max_steps": 8, "learning_rate": 3e-2, "seed": start},
            rows=rows,
            seed=number,
        )
        list(loop.train_steps(run))
        found.append(weights(run))
    assert all(torch.equal(W, found[1][name]) for name, W in found[0].items())
    assert not all(torch.equal(W, found[2][name]) for name, W in found[0].items())


def test_a_booster_is_drawn_evenly():
    names = [str(number) for number in range(10)]
    start, counts = seed(), dict.fromkeys(names, 0)
    for number in range(2000):
        booster = restart.drawn(names, 3, start, number)
        assert len(booster) == 3
        for name in booster:
            counts[name] += 1
    spread = (2000 * 0.3 * 0.7) ** 0.5
    assert all(abs(count - 600) < 5 * spread for count in counts.values())
    assert restart.drawn(names, 30, start, 0) == set(names)


def test_xgblora_as_it_comes_trains_beyond_the_steps_in_which_gradients_are_watched():
    """Layers of no booster so far have a B of zero, and so an A without a gradient: nothing is wrong with them."""
    run = training({"method": "xgblora", "r": 1}, {"max_steps": 24, "learning_rate": 3e-2})
    assert len(run.adapter.layers) > 11
    reports = list(loop.train_steps(run))
    assert reports[-1].step == 24


def test_a_layer_remembers_and_saves_a_rank_for_each_of_its_boosters():
    """Layers that no booster had are saved as a zero of rank 1."""
    run = training(
        {"method": "xgblora", "r": 1, **restarts(2, layers=3)}, {"max_steps": 10, "learning_rate": 3e-2}
    )
    list(loop.train_steps(run))
    boosters = [restart.drawn(list(run.adapter.layers), 3, 0, number) for number in range(5)]
    for spec in saved_form(run.adapter).plan.layers:
        had = [spec.name in layers for layers in boosters]
        assert spec.r == max(sum(had), 1)
        assert len(run.adapter.absorbed[spec.name]) == sum(had[:-1])


# ---- what is saved ------------------------------------------------------------------------------------------------


def loaded(run: loop.Training, folder: Path, kind: str, number: int) -> tuple[float, inject.Adapter]:
    """Save, put it on the original base, and compare the two models, in float64."""
    files.save(folder, run.adapter, "the/base", None)
    original = tiny.model(kind, number)
    adapter = put_on(original, folder)
    live = logits(run, run.model.eval().double())
    assert distance(logits(run, tiny.model(kind, number).double()), live) > 1e-4
    return distance(logits(run, original.double()), live), adapter


@pytest.mark.parametrize(
    "method", ["serial", "relora", "cola", "xgblora", "flora", "galore", "random_projection"]
)
@BOTH
def test_pieces_are_saved_as_exact_factors_and_as_whole_weights_once_these_are_smaller(
    tmp_path, kind, method
):
    number, settings = seed(), restarts(2, **({"layers": 20} if method == "xgblora" else {}))
    forms = []
    for steps in (6, 20):
        run = training(
            {"method": method, "r": 2, **settings},
            {"max_steps": steps, "learning_rate": 0.3 if method == "random_projection" else 1e-2},
            kind=kind,
            seed=number,
        )
        list(loop.train_steps(run))
        forms.append(saved_form(run.adapter))
        error, _ = loaded(run, tmp_path / str(steps), kind, number)
        assert error <= 1e-6
    factors, whole = forms
    assert {spec.r for spec in factors.plan.layers} == {3 * (4 if method == "random_projection" else 2)}
    assert not whole.plan.layers
    assert set(whole.plan.also) == {f"{name}.weight" for name in run.adapter.layers}
    assert whole.plan.method.delta.name == "whole"


LIFECYCLES = {
    **{name: restarts(2) for name in ("serial", "relora", "cola", "flora", "galore", "random_projection")},
    "xgblora": restarts(2, layers=5),
    "delta_lora": {"lifecycle": {"delta_lora": {"after": 2}}},
    "full": {},
    "optimizer_view": {},
}


@pytest.mark.parametrize("method", LIFECYCLES)
@BOTH
def test_without_the_adapter_every_tensor_of_the_model_is_what_it_was(kind, method):
    number = seed()
    run = training(
        {"method": method, **LIFECYCLES[method]},
        {"max_steps": 5, "learning_rate": 1e-2},
        kind=kind,
        seed=number,
    )
    pointers = {name: p.data_ptr() for name, p in plain_parameters(run).items()}
    list(loop.train_steps(run))
    trained = logits(run, run.model)
    run.adapter.deactivate()
    base = tiny.model(kind, number)
    assert all(torch.equal(p, run.model.get_parameter(name)) for name, p in base.named_parameters())
    assert {name: p.data_ptr() for name, p in run.model.named_parameters()} == pointers
    assert distance(trained, logits(run, base)) > 1e-3
    run.adapter.activate()
    assert torch.equal(logits(run, run.model), trained)


def plain_parameters(run: loop.Training) -> dict[str, nn.Parameter]:
    with inject.without_adapters(run.adapter):
        return dict(run.model.named_parameters())


# ---- delta_lora ---------------------------------------------------------------------------------------------------


def follows(after: int, ratio: float = 2.0) -> dict[str, Any]:
    return {"method": "delta_lora", "lifecycle": {"delta_lora": {"after": after, "ratio": ratio}}}


def w_and_product(run: loop.Training) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> (W0 and what is fixed beside it, s·B·A), float64."""
    found = {}
    for name, delta in run.adapter.deltas.items():
        fixed = delta.fixed_B.detach().double() @ delta.fixed_A.detach().double()
        W0 = run.adapter.original_weight(name).double()
        found[name] = (W0 + fixed, delta.scale * delta.B.detach().double() @ delta.A.detach().double())
    return found


@pytest.mark.parametrize("init", ["kaiming", "pissa", "symmetric"])
@pytest.mark.parametrize("after", [0, 1, 4])
def test_w_moves_by_a_multiple_of_what_the_product_of_the_factors_does(after, init):
    """W_T − W_K = λ·s·(B_T·A_T − B_K·A_K), and W is W_K until then."""
    run = training(
        {**follows(after, 1.5), "init": init}, {"max_steps": 10, "learning_rate": 1e-2}, seed=seed()
    )
    start = w_and_product(run)
    at = start
    for report in loop.train_steps(run):
        now = w_and_product(run)
        if report.step <= after:
            at = now
            assert all(distance(now[name][0], start[name][0]) <= 1e-6 for name in now)
    for name, (W, product) in w_and_product(run).items():
        W_K, product_K = at[name]
        assert distance(W - W_K, 1.5 * (product - product_K)) <= 1e-5
        assert distance(W, W_K) > 1e-3


@pytest.mark.parametrize("init", ["kaiming", "pissa", "symmetric", "zero_a"])
def test_delta_lora_starts_at_the_base_even_where_w_moves_at_once(init):
    number = seed()
    run = training({**follows(0), "init": init}, seed=number)
    assert distance(logits(run, run.model), logits(run, tiny.model("llama", number))) <= 1e-5


class PaperLayer(nn.Module):
    """Delta-LoRA as the paper writes it: W is a tensor that is written to after every step."""

    def __init__(self, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> None:
        super().__init__()
        self.W, self.bias, self.scale = W.clone(), bias, scale
        self.A, self.B = nn.Parameter(A.detach().clone()), nn.Parameter(B.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.W, self.bias) + self.scale * F.linear(F.linear(x, self.A), self.B)


@pytest.mark.parametrize("after", [0, 3])
@BOTH
def test_delta_lora_is_the_loop_of_the_paper(kind, after):
    """Outputs are W·x + s·B·A·x; after step t > K, W ← W + λ·s·(B_t·A_t − B_{t−1}·A_{t−1})."""
    settings = {"max_steps": 10, "learning_rate": 1e-3, "batch_size": 12, **CONSTANT}
    run = training(follows(after), settings, kind=kind, seed=seed())
    model = plain(run).requires_grad_(False)
    layers = {}
    for name, layer in run.adapter.layers.items():
        delta = layer.delta
        layers[name] = PaperLayer(layer.base.weight(), layer.base.bias, delta.A, delta.B, delta.scale)
        model.set_submodule(name, layers[name])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0)
    W0 = originals(run)
    for step, report in enumerate(loop.train_steps(run)):
        loss = loss_of(run, model, step)
        loss.backward()
        before = {name: layer.B.detach() @ layer.A.detach() for name, layer in layers.items()}
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 > after:
            for name, layer in layers.items():
                layer.W += 2.0 * layer.scale * (layer.B.detach() @ layer.A.detach() - before[name])
        assert report.loss == pytest.approx(loss.item(), abs=1e-5)
    for name, W in weights(run).items():
        paper = layers[name].W + layers[name].scale * layers[name].B.detach() @ layers[name].A.detach()
        assert distance(W, paper) <= 5e-5
        assert distance(W - W0[name], paper.double() - W0[name]) <= 1e-3


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@BOTH
def test_delta_lora_is_saved_as_lora_of_the_original_base(tmp_path, kind, init):
    number = seed()
    run = training(
        {**follows(2), "init": init}, {"max_steps": 8, "learning_rate": 5e-3}, kind=kind, seed=number
    )
    list(loop.train_steps(run))
    error, adapter = loaded(run, tmp_path, kind, number)
    assert error <= 1e-6
    assert {type(delta) for delta in adapter.deltas.values()} == {LowRank}


# ---- full ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "config"), [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("gpt2", {})]
)
def test_full_is_fine_tuning_of_every_parameter_by_adamw(kind, config):
    settings = {"max_steps": 6, "learning_rate": 1e-3, "weight_decay": 0.1, **CONSTANT}
    run = training({"method": "full"}, settings, kind=kind, seed=seed(), **config)
    model = plain(run)
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for p in named.values() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in named.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    start = copy.deepcopy(named)
    for step, report in enumerate(loop.train_steps(run)):
        loss = loss_of(run, model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert report.loss == pytest.approx(loss.item(), rel=1e-5)
    trained = dict(run.model.named_parameters())
    assert trained.keys() == named.keys()
    for name, parameter in named.items():
        assert (trained[name] - parameter).abs().max() <= 1e-6, name
        assert not torch.equal(parameter, start[name]), name


@BOTH
def test_full_is_saved_as_whole_weights_that_compute_the_same(tmp_path, kind):
    number = seed()
    run = training({"method": "full"}, {"max_steps": 4, "learning_rate": 1e-3}, kind=kind, seed=number)
    list(loop.train_steps(run))
    error, _ = loaded(run, tmp_path, kind, number)
    assert error == 0


def test_full_of_chosen_layers_trains_these_only():
    run = training(
        {"method": "full", "target_modules": ("q_proj",), "train_also": ()}, {"max_steps": 2}, seed=seed()
    )
    assert set(run.adapter.also) == {f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1)}
