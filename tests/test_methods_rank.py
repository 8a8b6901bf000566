"""Ranks over time: sora, dora_dynamic, dylora, prilora, against their formulas and against plain LoRA."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_cli.adapter import budget, files
from lora_cli.errors import UserError
from lora_cli.methods.rank import dora_dynamic, prilora
from lora_cli.run.export import export
from lora_cli.screen import Screen
from lora_cli.train.loop import Training, train_steps
from tests import tiny
from tests.adapters import ids, put_on
from tests.training import Rows, distance, training

R = 4
BOTH = pytest.mark.parametrize("kind", ["llama", "gpt2"])


@pytest.fixture(autouse=True)
def _other_numbers_in_every_session():
    torch.manual_seed(random.getrandbits(48))


def begun(method: str, rank: dict[str, Any] | None = None, **more: Any) -> Training:
    """A run of 20 steps."""
    train = {"max_steps": 20, "learning_rate": 0.01, **more.pop("train", {})}
    adapter = {"method": method, "r": R, "rank": {method: rank or {}}, **more.pop("adapter", {})}
    return training(adapter, train, **more)


def gates(run: Training) -> dict[str, Tensor]:
    return {name: delta.get_parameter("E").detach().clone() for name, delta in run.adapter.deltas.items()}


def fill(run: Training) -> None:
    """Random tensors and gradients."""
    with torch.no_grad():
        for parameter in run.adapter.trainable().values():
            parameter.copy_(torch.randn_like(parameter))
            parameter.grad = torch.randn_like(parameter)


def logits_of(run: Training, x: Tensor) -> Tensor:
    with torch.no_grad():
        return run.model.eval()(x).logits


def put_back(run: Training, folder: Path, kind: str = "llama") -> tuple[Tensor, Tensor, Any]:
    """Logits of what trained, and of what was saved on the original base; the loaded adapter."""
    x = ids()
    learned = logits_of(run, x)
    files.save(folder, run.adapter, "the/base", None)
    again = tiny.model(kind)
    assert distance(again(x).logits, learned) > 1e-3
    loaded = put_on(again, folder)
    return learned, again(x).logits, loaded


def same_courses(method: str, look: Any, rank: dict[str, Any], **train: Any) -> None:
    """What `look` sees after every step does not depend on how the rows are split."""
    rows = Rows()

    def course(micro_batch_size: int) -> list[Any]:
        asked = {"max_steps": 12, "batch_size": 6, "micro_batch_size": micro_batch_size, **train}
        run = begun(method, rank, train=asked, rows=rows)
        return [look(run) for _ in train_steps(run)]

    whole = course(6)
    assert len({str(each) for each in whole}) > 1
    assert course(2) == whole


# ---- the budget -------------------------------------------------------------------------------------------------


def test_the_largest_of_equals_are_the_first_and_never_more_than_asked():
    scores = torch.tensor([1.0, 3.0, 3.0, 3.0, 2.0])
    assert budget.largest(scores, 2).tolist() == [False, True, True, False, False]
    assert int(budget.largest(torch.zeros(9), 4).sum()) == 4
    assert not budget.largest(scores, 0).any()


def test_the_budget_falls_along_a_cubic_from_all_to_nothing():
    assert [budget.left(step, 2, 6) for step in range(8)] == [1, 1, 1, 0.75**3, 0.5**3, 0.25**3, 0, 0]
    assert [budget.left(step, 3, 3) for step in (2, 3, 4)] == [1, 0, 0]


# ---- sora -------------------------------------------------------------------------------------------------------


def test_a_gate_is_the_minimum_that_its_proximal_step_asks_for():
    """The argmin over z of (z − g)²/2 + threshold·|z|, on a fine grid."""
    run = begun("sora", {"threshold": 0.3})
    fill(run)
    before = gates(run)
    run.lifecycles[0].stepped(run)
    grid = torch.linspace(-6, 6, 12001, dtype=torch.float64)
    for name, after in gates(run).items():
        for g, found in zip(before[name].double(), after.double(), strict=True):
            best = grid[((grid - g) ** 2 / 2 + 0.3 * grid.abs()).argmin()]
            assert abs(best - found) < 2e-3
    closed = torch.cat(list(before.values())).abs() <= 0.3
    assert torch.equal(torch.cat(list(gates(run).values())) == 0, closed), "exact zeros"


def test_without_a_threshold_it_is_lora_with_gates():
    rows = Rows()
    gated = training(
        {"delta": {"gated": {"start": 1.0}}, "r": R}, {"max_steps": 5, "learning_rate": 0.01}, rows=rows
    )
    free = begun("sora", {"threshold": 0.0}, train={"max_steps": 5}, rows=rows)
    assert [r.loss for r in train_steps(free)] == [r.loss for r in train_steps(gated)]


def test_the_first_step_of_open_gates_is_that_of_lora():
    rows = Rows()
    lora = training({"r": R}, {"max_steps": 1, "learning_rate": 0.01}, rows=rows)
    sora = begun("sora", {"threshold": 0.0}, train={"max_steps": 1}, rows=rows)
    assert next(train_steps(sora)).grad_norm == pytest.approx(next(train_steps(lora)).grad_norm, rel=1e-6)
    for name, delta in lora.adapter.deltas.items():
        torch.testing.assert_close(sora.adapter.deltas[name].B, delta.B, rtol=1e-4, atol=1e-7)


@BOTH
def test_sora_closes_gates_and_saves_the_open_components_only(tmp_path, kind):
    run = begun("sora", {"threshold": 0.033}, train={"max_steps": 30, "learning_rate": 0.02}, kind=kind)
    list(train_steps(run))
    left = {name: max(int((E != 0).sum()), 1) for name, E in gates(run).items()}
    assert 1 <= min(left.values()) < max(left.values()) <= R
    learned, again, loaded = put_back(run, tmp_path, kind)
    assert distance(again, learned) < 1e-6
    assert {name: delta.A.shape[0] for name, delta in loaded.deltas.items()} == left
    assert json.loads((tmp_path / files.CONFIG).read_text())["peft_type"] == "LORA"


def test_a_closed_gate_of_sora_opens_again_where_the_gradient_beats_the_threshold():
    run = begun("sora", {"threshold": 0.01}, train={"optimizer": "sgd", "learning_rate": 1.0})
    fill(run)
    delta = next(iter(run.adapter.deltas.values()))
    with torch.no_grad():
        delta.get_parameter("E")[:2] = 0
        delta.get_parameter("E").grad[:2] = torch.tensor([0.009, 0.011])
    run.optimizer.step()
    run.lifecycles[0].stepped(run)
    assert (delta.get_parameter("E")[:2] != 0).tolist() == [False, True]


def test_gates_of_sora_are_scaled_by_the_r_at_the_start():
    run = begun("sora", {"threshold": 0.05}, adapter={"alpha": 8})
    scales = {delta.scale for delta in run.adapter.deltas.values()}
    list(train_steps(run))
    assert scales == {8 / R} == {delta.scale for delta in run.adapter.deltas.values()}


# ---- dora_dynamic -----------------------------------------------------------------------------------------------


def test_importance_is_the_share_of_a_component_in_the_norm_of_the_whole():
    """By the dense matrices, each made and measured."""
    run = begun("dora_dynamic")
    fill(run)
    for delta in run.adapter.deltas.values():
        A, B, c = (delta.get_parameter(key).detach().double() for key in "ABE")
        pieces = [c[k] * torch.outer(B[:, k], A[k]) for k in range(len(c))]
        whole = torch.linalg.norm(sum(pieces))
        expected = torch.stack([torch.linalg.norm(piece) / whole for piece in pieces])
        assert distance(dora_dynamic.importance(delta).detach(), expected) < 1e-5


def test_importance_at_a_start_of_zero_is_zero():
    run = begun("dora_dynamic")
    for delta in run.adapter.deltas.values():
        assert not dora_dynamic.importance(delta).count_nonzero()


def test_as_many_components_are_open_as_planned_and_those_that_are_closed_stay_closed():
    run = begun("dora_dynamic", {"every": 2}, train={"weight_decay": 0.1})
    first = sum(len(E) for E in gates(run).values())
    last = R * len(run.adapter.deltas)
    assert first == 6 * len(run.adapter.deltas)
    gone = torch.zeros(first, dtype=torch.bool)
    counts = []
    for report in train_steps(run):
        E = torch.cat(list(gates(run).values()))
        assert not (E[gone] != 0).any()
        if report.step >= 3:
            gone = E == 0
        counts.append(int((E != 0).sum()))
        if report.step in (5, 7, 9):  # begin 3, end 10
            left = 1 - (report.step - 3) / 7
            assert counts[-1] == round(last + (first - last) * left**3)
    assert counts[9:] == [last] * 11
    states = (run.optimizer.state[delta.get_parameter("E")] for delta in run.adapter.deltas.values())
    closed = [(state["exp_avg"], state["exp_avg_sq"]) for state in states]
    moments = torch.cat([(mean.abs() + square) for mean, square in closed])
    assert not moments[gone].count_nonzero()


def test_the_penalty_is_the_variance_within_rows_of_a_and_columns_of_b_until_ranks_are_fixed():
    run = begun("dora_dynamic", {"dispersion": 0.7})
    fill(run)
    expected = 0.0
    for delta in run.adapter.deltas.values():
        rows = [torch.var(row).item() for row in delta.A.detach().double()]
        columns = [torch.var(column).item() for column in delta.B.detach().double().t()]
        expected += (sum(rows) / len(rows) + sum(columns) / len(columns)) / len(run.adapter.deltas)
    assert run.lifecycles[0].penalty(run).item() == pytest.approx(0.7 * expected, rel=1e-5)
    run.step = 10
    assert run.lifecycles[0].penalty(run) is None


def test_micro_batches_do_not_change_the_ranks_of_dora_dynamic():
    same_courses(
        "dora_dynamic",
        lambda run: [(E != 0).tolist() for E in gates(run).values()],
        {"every": 1, "begin": 0.1, "end": 0.9},
    )


@BOTH
def test_dora_dynamic_saves_the_open_components_only(tmp_path, kind):
    run = begun("dora_dynamic", {"every": 1}, kind=kind)
    list(train_steps(run))
    learned, again, loaded = put_back(run, tmp_path, kind)
    assert distance(again, learned) < 1e-6
    ranks = [delta.A.shape[0] for delta in loaded.deltas.values()]
    assert sum(ranks) == R * len(ranks)
    assert len(set(ranks)) > 1


# ---- dylora -----------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("b", [1, 3, R])
def test_what_computes_is_lora_of_rank_b_with_its_own_scale(kind, b):
    """A[:b], B[:, :b] and α/b; whole when it is evaluated."""
    run = begun("dylora", kind=kind, adapter={"alpha": 12.0})
    fill(run)
    run.lifecycles[0]._use(b)
    for layer in run.adapter.layers.values():
        x = torch.randn(5, layer.base.in_features)
        A, B = layer.delta.A[:b], layer.delta.B[:, :b]
        expected = layer.base_layer(x) + 12.0 / b * F.linear(F.linear(x, A), B)
        torch.testing.assert_close(layer.train()(x), expected, rtol=1e-4, atol=1e-4)
        whole = layer.base_layer(x) + 12.0 / R * F.linear(F.linear(x, layer.delta.A), layer.delta.B)
        torch.testing.assert_close(layer.eval()(x), whole, rtol=1e-4, atol=1e-4)


def ranks_of(run: Training) -> list[int]:
    """The b of every step."""
    found = [int(run.lifecycles[0].state()["b"])]
    found += [int(run.lifecycles[0].state()["b"]) for _ in train_steps(run)]
    return found[:-1]


def test_every_rank_is_drawn_alike_and_follows_from_the_seed():
    first, again, other = (
        ranks_of(begun("dylora", train={"max_steps": 60, "seed": seed, "batch_size": 1}))
        for seed in (3, 3, 4)
    )
    assert first == again != other
    counts = torch.bincount(torch.tensor(first + other), minlength=R + 1)[1:]
    assert len(counts) == R
    assert (counts - 30).abs().max() < 5 * (120 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize("frozen", [False, True])
def test_only_the_first_components_have_a_gradient_and_frozen_only_the_last_of_these(frozen):
    run = begun("dylora", {"frozen": frozen}, train={"micro_batch_size": 2})
    controller, seen = run.lifecycles[0], set[int]()
    with torch.no_grad():
        for delta in run.adapter.deltas.values():
            delta.B.normal_(std=0.1)
    stepped = controller.stepped

    def looking(run: Training) -> None:
        b = int(controller.state()["b"])
        for delta in run.adapter.deltas.values():
            for gradients in (delta.A.grad, delta.B.grad.t()):
                given = [bool(each.count_nonzero()) for each in gradients]
                assert given == [k < b and (not frozen or k == b - 1) for k in range(R)]
        seen.add(b)
        stepped(run)

    controller.stepped = looking
    list(train_steps(run))
    assert len(seen) == R


def test_frozen_with_a_large_r_is_not_taken_for_dead():
    """A component of A learns when its turn comes again; of 256 that is not within the steps that are watched."""
    run = begun("dylora", {"frozen": True}, adapter={"r": 256}, train={"batch_size": 1})
    drawn = ranks_of(run)
    assert len(drawn) == 20
    assert run.connected.all()


def test_the_rank_of_a_step_is_the_same_for_all_its_micro_batches():
    run = begun("dylora", train={"batch_size": 6, "micro_batch_size": 1})
    name, layer = next(iter(run.adapter.layers.items()))
    seen: list[tuple[int, int]] = []
    layer.register_forward_pre_hook(lambda *_: seen.append((run.step, layer.delta.b)))
    list(train_steps(run))
    assert len(seen) == 20 * 6, name
    assert len(set(seen)) == 20
    assert len({b for _, b in seen}) == R


def test_a_layer_of_smaller_r_computes_with_all_it_has():
    run = begun("dylora", adapter={"rank_pattern": {"q_proj": 2}})
    run.lifecycles[0]._use(3)
    assert {(name.endswith("q_proj"), delta.b) for name, delta in run.adapter.deltas.items()} == {
        (True, 2),
        (False, 3),
    }


def test_dylora_is_saved_whole_as_plain_lora(tmp_path):
    run = begun("dylora")
    list(train_steps(run))
    run.lifecycles[0]._use(1)
    learned, again, loaded = put_back(run, tmp_path)
    assert distance(again, learned) < 1e-6
    assert {delta.A.shape[0] for delta in loaded.deltas.values()} == {R}


@pytest.mark.parametrize("frozen", [False, True])
def test_one_checkpoint_serves_every_rank(tmp_path, frozen):
    """The recipe is trained once; what `lora export --r b` writes is what computes while the first b train."""
    model = tiny.model("llama", bos_token_id=1)
    model.save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    adapter = {"rank_pattern": {"q_proj": 2}, "scale": "rslora", "lora_bias": False}
    run = begun("dylora", {"frozen": frozen}, adapter=adapter, train={"max_steps": 6}, bos_token_id=1)
    list(train_steps(run))
    (tmp_path / "adapter").mkdir()
    files.save(tmp_path / "adapter", run.adapter, str(tmp_path / "base"), None)
    x, seen = ids(), []
    for b in range(1, R + 1):
        export(tmp_path / "adapter", "peft", tmp_path / str(b), Screen(), r=b)
        again = tiny.model("llama", bos_token_id=1)
        loaded = put_on(again, tmp_path / str(b))
        ranks = {(name.endswith("q_proj"), delta.A.shape[0]) for name, delta in loaded.deltas.items()}
        assert ranks == {(True, min(b, 2)), (False, b)}
        run.lifecycles[0]._use(b)
        with torch.no_grad():
            expected = run.model.train()(x).logits
            assert distance(again(x).logits, expected) < 1e-5
        seen.append(expected)
    assert all(distance(seen[-1], other) > 1e-4 for other in seen[:-1])
    with pytest.raises(UserError, match="its rank is 4"):
        export(tmp_path / "adapter", "peft", tmp_path / "more", Screen(), r=R + 1)


def test_what_dylora_did_not_train_is_not_cut(tmp_path):
    tiny.model("llama").save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    files.save(tmp_path / "adapter", training({"r": R}).adapter, str(tmp_path / "base"), None)
    with pytest.raises(UserError, match="only of an adapter that dylora has trained"):
        export(tmp_path / "adapter", "peft", tmp_path / "out", Screen(), r=2)


def test_a_start_that_is_a_part_of_w_is_refused():
    with pytest.raises(UserError, match="of one b only"):
        begun("dylora", adapter={"init": "pissa"})


# ---- prilora ----------------------------------------------------------------------------------------------------


def test_ranks_rise_linearly_from_4_to_12_as_in_the_paper():
    run = begun("prilora", adapter={"r": 8}, num_hidden_layers=5)
    by_block = {spec.name.split(".")[2]: spec.r for spec in run.adapter.plan.layers}
    assert by_block == {"0": 4, "1": 6, "2": 8, "3": 10, "4": 12}
    assert all(spec.scale == spec.alpha / spec.r for spec in run.adapter.plan.layers)
    assert {spec.r for spec in begun("prilora", {"spread": 0.0}).adapter.plan.layers} == {R}
    single = begun("prilora", adapter={"r": 8, "layers": (1,)})
    assert {spec.r for spec in single.adapter.plan.layers} == {8}, "one block is the middle"


@BOTH
@pytest.mark.parametrize("share", [0.5, 0.3])
def test_the_least_entries_of_every_row_by_weight_and_input_are_zero_after_a_pruning(kind, share):
    """Inputs averaged over prunings, seen by hooks of this test; between prunings what was zeroed learns on."""
    run = begun("prilora", {"every": 5, "share": share, "beta": 0.8}, kind=kind, train={"max_steps": 13})
    pruner, squares, checked = run.lifecycles[0], {}, 0
    stepped = pruner.stepped

    def checking(run: Training) -> None:
        nonlocal checked
        before = {name: delta.A.detach().clone() for name, delta in run.adapter.deltas.items()}
        prunes = run.step % 5 == 0
        seen = inputs_of(run) if prunes else {}
        stepped(run)
        for name, delta in run.adapter.deltas.items():
            if not prunes:
                assert torch.equal(delta.A, before[name])
                continue
            squares[name] = 0.8 * squares[name] + 0.2 * seen[name] if name in squares else seen[name]
            scores = before[name].double().abs() * squares[name].sqrt()
            count = int(share * scores.shape[1])
            assert ((delta.A == 0).sum(1) == count).all()
            for row, kept in zip(scores, delta.A != 0, strict=True):
                assert row[~kept].max() <= row[kept].min() * (1 + 1e-5)
            checked += 1

    pruner.stepped = checking
    zeros = 0
    for report in train_steps(run):
        zeros = sum(int((delta.A == 0).sum()) for delta in run.adapter.deltas.values())
        assert (zeros > 0) == (report.step % 5 == 0)
    assert checked == 2 * len(run.adapter.deltas)


def inputs_of(run: Training) -> dict[str, Tensor]:
    """Layer -> mean of x² over all tokens of the rows of the next step, float64 [in]."""
    found: dict[str, list[Tensor]] = {name: [] for name in run.adapter.layers}
    handles = [
        layer.register_forward_pre_hook(lambda m, i, name=name: found[name].append(i[0].flatten(0, -2)))
        for name, layer in run.adapter.layers.items()
    ]
    with torch.no_grad():
        for row in run.rows(run.step):
            run.model(torch.tensor(run.examples[row].input_ids)[None])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(each).double().square().mean(0) for name, each in found.items()}


def test_rows_keep_exactly_as_many_entries_even_where_all_are_equal():
    kept = prilora.most_of_rows(torch.ones(3, 7), 0.5)
    assert kept.sum(1).tolist() == [4, 4, 4]


def test_micro_batches_do_not_change_what_prilora_prunes():
    same_courses(
        "prilora",
        lambda run: [(delta.A == 0).tolist() for delta in run.adapter.deltas.values()],
        {"every": 3},
    )
