"""What is pruned on the way: entries by sparse_adapter, for good, and roselora, anew each step; pairs by lora_drop."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_cli.adapter import files
from lora_cli.methods.lifecycle import lora_drop
from lora_cli.train import checkpoint
from lora_cli.train.loop import Training, train_steps
from tests import tiny
from tests.adapters import ids, put_on
from tests.training import Rows, distance, loss_of, training

BOTH = pytest.mark.parametrize("kind", ["llama", "gpt2"])


@pytest.fixture(autouse=True)
def _other_numbers_in_every_session():
    torch.manual_seed(random.getrandbits(48))


def begun(method: str, settings: dict[str, Any], **more: Any) -> Training:
    """A run of 12 steps."""
    train = {"max_steps": 12, "learning_rate": 0.01, **more.pop("train", {})}
    adapter = {"method": method, "r": 4, "lifecycle": {method: settings}, **more.pop("adapter", {})}
    return training(adapter, train, **more)


def tensors(run: Training) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in run.adapter.trainable().items()}


def entries(run: Training) -> Tensor:
    """Of all factors, one after the other."""
    return torch.cat([tensor.flatten() for tensor in tensors(run).values()])


def memories(run: Training) -> Tensor:
    """What Adam remembers of each of them: the sum of both moments' sizes."""
    states = [run.optimizer.state[p] for p in run.adapter.trainable().values()]
    return torch.cat([(state["exp_avg"].abs() + state["exp_avg_sq"]).flatten() for state in states])


# ---- sparse_adapter ---------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(("sparsity", "score"), [(0.8, "snip"), (0.5, "random"), (0.0, "snip")])
def test_exactly_the_share_is_pruned_after_the_first_steps_and_stays_zero_for_ever(kind, sparsity, score):
    settings = {"sparsity": sparsity, "score": score, "after": 4}
    run = begun("sparse_adapter", settings, kind=kind, train={"weight_decay": 0.1})
    total, gone = len(entries(run)), torch.zeros(0, dtype=torch.bool)
    for report in train_steps(run):
        zero = entries(run) == 0
        if report.step < 5:
            assert not zero.all()
            continue
        if report.step == 5:
            gone = zero
            assert int(gone.sum()) == int(sparsity * total)
        assert torch.equal(zero, gone)
        assert not memories(run)[gone].count_nonzero()
        assert memories(run)[~gone].count_nonzero() == (~gone).sum()


def test_the_score_is_weight_times_gradient_of_the_step_over_the_whole_adapter():
    """Taken where both are known at once: of the weight before the step and the gradient of all its rows."""
    run = begun(
        "sparse_adapter", {"sparsity": 0.7, "after": 3}, train={"batch_size": 6, "micro_batch_size": 2}
    )
    lifecycle, scores = run.lifecycles[1], torch.zeros(0)
    look = lifecycle.gradients

    def looking(run: Training) -> None:
        nonlocal scores
        if run.step == 3:
            named = run.adapter.trainable().values()
            scores = torch.cat([(p.detach().double() * p.grad.double()).abs().flatten() for p in named])
            assert (scores > 0).double().mean() > 0.9, "half of LoRA has none before its first step"
        look(run)

    lifecycle.gradients = looking
    list(train_steps(run))
    kept = entries(run) != 0
    assert scores[kept].min() >= scores[~kept].max()
    assert len({float((tensor != 0).double().mean()) for tensor in tensors(run).values()}) > 3, (
        "one threshold for all"
    )


def test_scores_of_both_factors_of_a_component_add_up_to_the_same_with_their_signs():
    """Why |w·∂w| does not favour A, which is far larger than B: Σ A ⊙ ∂A = Σ B ⊙ ∂B."""
    run = begun("sparse_adapter", {})
    with torch.no_grad():
        for delta in run.adapter.deltas.values():
            delta.B.normal_(std=0.1)
    run.model(ids()).logits.square().sum().backward()
    for delta in run.adapter.deltas.values():
        of_A, of_B = (delta.A * delta.A.grad).sum(1), (delta.B * delta.B.grad).sum(0)
        torch.testing.assert_close(of_A, of_B, rtol=1e-3, atol=1e-4 * of_B.abs().max().item())


def test_a_step_that_overflowed_is_not_scored():
    run = begun("sparse_adapter", {"sparsity": 0.5, "after": 1})
    lifecycle = run.lifecycles[1]
    run.step = 1
    for finite in (False, True):
        for p in run.adapter.trainable().values():
            p.grad = torch.randn_like(p)
            p.grad.view(-1)[0] = 1.0 if finite else float("inf")
        lifecycle.gradients(run)
        assert bool(lifecycle.state()) == finite


def test_micro_batches_and_a_restart_do_not_change_what_is_pruned(tmp_path):
    rows, found, saved = Rows(), [], None
    for micro_batch_size in (6, 2):
        train = {"batch_size": 6, "micro_batch_size": micro_batch_size}
        run = begun("sparse_adapter", {"after": 3}, train=train, rows=rows)
        for report in train_steps(run):
            if report.step == 6:
                saved = checkpoint.save(tmp_path / str(micro_batch_size), run, {})
        found.append(entries(run) != 0)
    assert (found[0] ^ found[1]).double().mean() < 0.01, "but for ties that rounding decides"
    again = begun("sparse_adapter", {"after": 3}, train={"batch_size": 6, "micro_batch_size": 2}, rows=rows)
    checkpoint.restore(saved, again)
    list(train_steps(again))
    assert torch.equal(entries(again), entries(run))


# ---- roselora ---------------------------------------------------------------------------------------------------


def components(run: Training) -> list[Tensor]:
    """Of every layer the rows of A and the columns of B, [r, in] and [r, out]."""
    return [each.detach() for delta in run.adapter.deltas.values() for each in (delta.A, delta.B.t())]


@BOTH
def test_every_component_keeps_the_share_of_the_schedule_after_every_step(kind):
    run = begun("roselora", {"density": 0.1, "begin": 0.2, "end": 0.8}, kind=kind, train={"max_steps": 20})
    for report in train_steps(run):
        t = min(max((report.step - 4) / 12, 0), 1)
        share = 0.1 + 0.9 * (1 - t) ** 3
        for each in components(run):
            size = each.shape[1]
            assert ((each != 0).sum(1) <= max(size - int(size * (1 - share)), 1)).all()
            if t == 1:
                assert ((each != 0).sum(1) == max(size - int(size * 0.9), 1)).all()


def test_importance_is_the_average_of_weight_times_gradient_and_the_most_important_stay():
    run = begun("roselora", {"density": 0.25, "begin": 0.0, "end": 0.5, "beta": 0.8})
    lifecycle = run.lifecycles[1]
    mean = {name: torch.zeros_like(p).double() for name, p in run.adapter.trainable().items()}
    for step in range(1, 5):
        run.step = step
        for name, p in run.adapter.trainable().items():
            p.data.copy_(torch.randn_like(p))
            p.grad = torch.randn_like(p)
            mean[name] = 0.8 * mean[name] + 0.2 * (p.detach().double() * p.grad.double()).abs()
        lifecycle.stepped(run)
        for name, p in run.adapter.trainable().items():
            value = mean[name] if name.endswith(".A") else mean[name].t()
            kept = (p != 0) if name.endswith(".A") else (p != 0).t()
            for row, stays in zip(value, kept, strict=True):
                assert not stays.all()
                assert row[stays].min() >= row[~stays].max()


def test_what_was_zeroed_may_come_back():
    """No fixed mask: what stays follows the importance."""
    run = begun("roselora", {"density": 0.3, "begin": 0.0, "end": 0.2, "beta": 0.0}, train={"max_steps": 20})
    gone, back = torch.zeros_like(entries(run), dtype=torch.bool), 0
    for report in train_steps(run):
        if report.step > 6:
            back += int(((entries(run) != 0) & gone).sum())
        gone = entries(run) == 0
    assert back


@BOTH
def test_the_merged_weight_changes_only_where_a_column_meets_a_row_and_is_as_sparse_as_the_bound(
    tmp_path, kind
):
    """The share of zeros of B·A is at least 1 + Σ (s(a) + s(b) − s(a)·s(b)) − r."""
    run = begun("roselora", {"density": 0.1, "end": 0.5}, kind=kind, adapter={"r": 2})
    list(train_steps(run))
    files.save(tmp_path, run.adapter, "the/base", None)
    again = tiny.model(kind)
    loaded = put_on(again, tmp_path)
    assert distance(again(ids()).logits, tiny.model(kind)(ids()).logits) > 0
    for name, layer in run.adapter.layers.items():
        delta = layer.delta
        touched = torch.zeros(layer.base.out_features, layer.base.in_features, dtype=torch.bool)
        bound = 1.0 - 2
        for k in range(2):
            a, b = delta.A[k] != 0, delta.B[:, k] != 0
            touched |= torch.outer(b, a)
            s_a, s_b = 1 - a.double().mean(), 1 - b.double().mean()
            bound += float(s_a + s_b - s_a * s_b)
        changed = loaded.layers[name].merged_weight() != layer.base.weight()
        assert not (changed & ~touched).any()
        assert changed.any()
        assert 1 - changed.double().mean() >= max(bound, 0) - 1e-9


# ---- lora_drop --------------------------------------------------------------------------------------------------


def sharing(threshold: float = 0.6, **more: Any) -> Training:
    return begun("lora_drop", {"after": 0.25, "threshold": threshold}, num_hidden_layers=4, **more)


def pairs(run: Training) -> dict[str, list[list[str]]]:
    """Ending of a name -> the layers that have one A and one B."""
    found: dict[str, dict[tuple[int, int], list[str]]] = {}
    for name, delta in run.adapter.deltas.items():
        ids_of = id(delta.A), id(delta.B)
        found.setdefault(name.rpartition(".")[2], {}).setdefault(ids_of, []).append(name)
    return {kind: list(each.values()) for kind, each in found.items()}


def test_what_a_layer_does_is_the_mean_square_of_its_output():
    """By hooks of this test, of every token of the rows of the next step."""
    run = sharing()
    with torch.no_grad():
        for delta in run.adapter.deltas.values():
            delta.B.normal_(std=0.1)
    seen: dict[str, list[Tensor]] = {name: [] for name in run.adapter.layers}
    handles = [
        layer.register_forward_pre_hook(lambda m, i, name=name: seen[name].append(i[0].flatten(0, -2)))
        for name, layer in run.adapter.layers.items()
    ]
    with torch.no_grad():
        for row in run.rows(0):
            run.model(torch.tensor(run.examples[row].input_ids)[None])
    for handle in handles:
        handle.remove()
    measured = run.measure("inputs")
    for name, delta in run.adapter.deltas.items():
        y = torch.cat(seen[name]).double() @ delta.weight().double().t()
        expected = y.square().sum(1).mean().item()
        assert lora_drop.output(delta, measured[name]) == pytest.approx(expected, rel=1e-4)


def test_the_fewest_that_add_up_to_the_threshold_keep_their_own():
    done = {"a": 5.0, "b": 1.0, "c": 3.0, "d": 1.0}
    assert lora_drop.keeping(done, 0.5) == ["a"]
    assert lora_drop.keeping(done, 0.51) == ["a", "c"]
    assert lora_drop.keeping(done, 0.9) == ["a", "c", "b"]
    assert sorted(lora_drop.keeping(done, 1.0)) == list("abcd")
    assert lora_drop.keeping(done, 0.0) == []


def test_the_others_of_a_kind_train_one_pair_whose_gradient_is_the_sum_of_theirs():
    run = sharing()
    for report in train_steps(run):
        groups = pairs(run)
        if report.step < 3:
            assert all(len(each) == 4 for each in groups.values())
            continue
        assert all(sum(len(names) > 1 for names in each) <= 1 for each in groups.values())
        owned = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
        assert owned == {id(p) for d in run.adapter.deltas.values() for p in (d.A, d.B)}
        count = sum(len(each) for each in groups.values())
        assert len(run.adapter.trainable()) == len(owned) == 2 * count
    kind, shared = next((k, names) for k, each in pairs(run).items() for names in each if len(names) > 1)
    assert len(shared) < 4, kind
    first = run.adapter.deltas[shared[0]]
    run.optimizer.zero_grad()
    loss_of(run, run.model, 0).backward()
    together = first.A.grad.clone(), first.B.grad.clone()
    alone = [torch.zeros_like(first.A), torch.zeros_like(first.B)]
    for name in shared:
        A, B = torch.nn.Parameter(first.A.detach().clone()), torch.nn.Parameter(first.B.detach().clone())
        delta = run.adapter.deltas[name]
        kept, (delta.A, delta.B) = (delta.A, delta.B), (A, B)
        loss_of(run, run.model, 0).backward()
        delta.A, delta.B = kept
        alone = [alone[0] + A.grad, alone[1] + B.grad]
    for found, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_a_shared_pair_starts_as_the_base_and_the_others_stay_what_they_were():
    run = sharing()
    lifecycle = run.lifecycles[1]
    stepped, before = lifecycle.stepped, dict[str, Tensor]()

    def looking(run: Training) -> None:
        before.update({name: delta.weight() for name, delta in run.adapter.deltas.items()})
        stepped(run)
        if run.step == 3:
            for kind in pairs(run).values():
                for names in kind:
                    for name in names:
                        weight = run.adapter.deltas[name].weight()
                        assert torch.equal(weight, before[name]) or (len(names) > 1 and not weight.any())
                    assert (len(names) > 1) == (not run.adapter.deltas[names[0]].weight().any())

    lifecycle.stepped = looking
    list(train_steps(run))


def test_lora_drop_goes_on_from_a_checkpoint_and_back_to_one_in_which_nothing_was_shared(tmp_path):
    rows, saved = Rows(), {}
    run = sharing(rows=rows)
    for report in train_steps(run):
        saved[report.step] = checkpoint.save(tmp_path, run, {})
    for start in (2, 7):
        again = sharing(rows=rows)
        checkpoint.restore(saved[start], again)
        list(train_steps(again))
        assert pairs(again) == pairs(run)
        assert torch.equal(entries(again), entries(run))
    checkpoint.restore(saved[2], run)
    assert all(len(each) == 4 for each in pairs(run).values())


@BOTH
def test_lora_drop_is_saved_as_plain_lora(tmp_path, kind):
    blocks = {"n_layer": 4} if kind == "gpt2" else {"num_hidden_layers": 4}
    run = begun("lora_drop", {"after": 0.25, "threshold": 0.3}, kind=kind, **blocks)
    list(train_steps(run))
    assert any(len(names) > 1 for each in pairs(run).values() for names in each)
    x = ids()
    files.save(tmp_path, run.adapter, "the/base", None)
    again = tiny.model(kind, **blocks)
    plain = again(x).logits
    put_on(again, tmp_path)
    learned = run.model.eval()(x).logits
    assert distance(again(x).logits, learned) < 1e-6
    assert distance(plain, learned) > 1e-3
