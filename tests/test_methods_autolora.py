"""autolora: shares that learn from held-out rows alone, against autograd; then plain LoRA with the ranks they say."""

import json
import random

import pytest
import torch
from torch import Tensor

from lora_cli.adapter import files
from lora_cli.methods.rank import autolora
from lora_cli.train.loop import train_steps
from tests import tiny
from tests.adapters import ids, put_on
from tests.test_methods_alora import BOTH, FEW, goes_back, in_bfloat16, learned, ranks
from tests.test_methods_rank import R, begun, logits_of, same_courses
from tests.test_train_held_out import of_rows
from tests.training import Rows, distance, plain, training


@pytest.fixture(autouse=True)
def _other_numbers_in_every_session():
    torch.manual_seed(random.getrandbits(48))


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_components_count_by_their_shares_and_in_full_once_it_is_decided(kind, dtype, monkeypatch):
    if dtype == "bfloat16":
        in_bfloat16(monkeypatch)
    run = begun("autolora", kind=kind, adapter=FEW)
    learned(run)
    for name, layer in run.adapter.layers.items():
        delta = layer.delta
        with torch.no_grad():
            delta.E.normal_()
        A, B, E = (delta.get_parameter(key).detach().double() for key in "ABE")
        shares = E.exp() / E.exp().sum()
        for decided, gates in ((False, shares), (True, torch.ones(R))):
            delta.decided = decided
            expected = 12.0 / R * sum(gates[k] * torch.outer(B[:, k], A[k]) for k in range(R))
            assert distance(delta.weight(), expected) < 1e-5, name
            x = torch.randn(5, layer.base.in_features).to(layer.base.dtype)
            y = layer(x) - layer.base(x)
            assert distance(y, x.double() @ expected.t()) < (1e-4 if dtype == "float32" else 0.1)


@BOTH
def test_a_and_b_learn_from_their_rows_only_and_shares_from_the_others_only(kind):
    run = begun("autolora", {"held_out": 0.4}, kind=kind, train={"micro_batch_size": 3})
    learned(run)
    with torch.no_grad():
        for delta in run.adapter.deltas.values():
            delta.get_parameter("E").normal_()
    assert run.held_out(0) == round(0.4 * 24)
    inner, outer = (of_rows(run, rows) for rows in (run.rows(0), run.outer_rows(0)))
    assert not set(run.rows(0)) & set(run.outer_rows(0))
    seen: dict[str, Tensor] = {}
    run.lifecycles[0].gradients = lambda run: seen.update(
        {name: p.grad.clone() for name, p in run.trained.items()}
    )
    next(train_steps(run))
    assert any(name.endswith(".E") for name in seen)
    for name, gradient in seen.items():
        own, other = (outer, inner) if name.endswith(".E") else (inner, outer)
        assert distance(gradient, own[name]) < 1e-4
        assert distance(gradient, other[name]) > 1e-2


@pytest.mark.parametrize("r", range(1, 70, 4))
def test_a_component_stays_whose_share_is_one_over_r_at_least(r):
    E = torch.randn(r, dtype=torch.float64)
    expected = [bool(E[k].exp() >= E.exp().mean()) for k in range(r)]
    assert autolora.staying(E.float()).tolist() == expected
    assert autolora.staying(E.float()).any()
    assert autolora.staying(torch.full((r,), random.uniform(-3, 3))).all(), "equal shares are 1/r"


@BOTH
def test_after_the_search_it_is_plain_lora_from_scratch_with_the_ranks_that_were_found(kind):
    """To the bit what LoRA learns in the rest of the steps: on all rows, with a fresh optimizer."""
    rows = Rows()
    run = begun("autolora", {"search": 0.4}, kind=kind, adapter=FEW, rows=rows)
    steps = train_steps(run)
    for _ in range(7):
        next(steps)
    assert set(ranks(run)) == {R}
    found = {name: 1 + number % (R - 1) for number, name in enumerate(run.adapter.deltas)}
    with torch.no_grad():
        for name, r in found.items():
            delta = run.adapter.deltas[name]
            delta.E.fill_(-1.0)[torch.randperm(R)[:r]] = 1.0
    before, searched = logits_of(run, x := ids()), run.lifecycles[0]
    run.model.train()
    next(steps)
    assert dict(zip(found, ranks(run), strict=True)) == found
    assert searched.decided
    assert not any(name.endswith(".E") for name in run.adapter.trainable())
    assert torch.equal(logits_of(run, x), plain(run).eval()(x).logits), "B is zero again"
    assert distance(before, logits_of(run, x)) > 1e-6
    run.model.train()

    patterns = {name.replace(".", r"\."): r for name, r in found.items()}
    scales = {name: 12.0 / R * r for name, r in patterns.items()}
    lora = training(
        {"r": R, "layers": (0,), "rank_pattern": patterns, "alpha_pattern": scales},
        {"max_steps": 20, "learning_rate": 0.01},
        kind=kind,
        rows=rows,
    )
    for name, delta in lora.adapter.deltas.items():
        own = run.adapter.deltas[name]
        assert delta.scale == pytest.approx(own.scale)
        delta.scale = own.scale
        assert distance(own.A.std(), delta.A.std()) < 1, "drawn as LoRA's"
        delta.A.data.copy_(own.A)
    lora.step = 8
    assert [each.loss for each in steps] == [each.loss for each in train_steps(lora)]


def test_shares_do_not_depend_on_micro_batches():
    same_courses("autolora", ranks, {"search": 0.5})


@BOTH
def test_autolora_is_saved_as_lora_wherever_it_ends(tmp_path, kind):
    run = begun("autolora", {"search": 0.3}, kind=kind, adapter=FEW, train={"max_steps": 8})
    for report in train_steps(run):
        if report.step not in (1, 8):
            continue
        folder = tmp_path / str(report.step)
        folder.mkdir()
        x = ids()
        trained = logits_of(run, x)
        files.save(folder, run.adapter, "the/base", None)
        put_on(again := tiny.model(kind), folder)
        assert distance(again(x).logits, trained) < 1e-6
        assert json.loads((folder / files.CONFIG).read_text())["peft_type"] == "LORA"
        run.model.train()


def test_what_would_be_decided_after_the_last_step_is_not():
    """A training from scratch without a step would leave nothing."""
    run = begun("autolora", {"search": 0.99}, adapter=FEW, train={"max_steps": 4})
    list(train_steps(run))
    assert not run.lifecycles[0].decided
    assert all(delta.get_parameter("B").any() for delta in run.adapter.deltas.values())


def test_a_run_goes_back_to_what_it_was_before_ranks_were_decided(tmp_path):
    goes_back(begun("autolora", {"search": 0.5}, adapter=FEW, train={"max_steps": 8}), tmp_path)
