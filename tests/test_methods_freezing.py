"""What does not train: aflora freezes factors on the way, dropbp leaves branches out of the backward pass."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lora_cli.adapter import files, held
from lora_cli.errors import UserError
from lora_cli.methods.lifecycle import dropbp
from lora_cli.train import checkpoint
from lora_cli.train.loop import Training, train_steps
from tests import tiny
from tests.adapters import ids, put_on
from tests.training import Rows, distance, loss_of, training

BOTH = pytest.mark.parametrize("kind", ["llama", "gpt2"])


@pytest.fixture(autouse=True)
def _other_numbers_in_every_session():
    torch.manual_seed(random.getrandbits(48))


# ---- held -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_what_is_frozen_leaves_the_optimizer_and_the_others_go_on_as_without_it(optimizer):
    first, second = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5))
    alone = nn.Parameter(second.detach().clone())
    groups = [{"params": [first, second], "names": ["first", "second"]}]
    both, single = optimizer(groups, lr=0.1), optimizer([alone], lr=0.1)
    for step in range(4):
        if step == 2:
            held.freeze([first], both)
            frozen = first.detach().clone()
        for parameter in (second, alone, *([first] if step < 2 else [])):
            parameter.grad = torch.full_like(parameter, 0.3 + step)
        both.step()
        single.step()
    assert torch.equal(first, frozen)
    assert not first.requires_grad
    assert first not in both.state
    assert both.param_groups[0]["names"] == ["second"]
    assert torch.equal(second, alone)


def test_closed_entries_stay_zero_whatever_adam_remembers_and_decays():
    parameter, kept = nn.Parameter(torch.randn(4, 6)), torch.rand(4, 6) < 0.5
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.1)
    for step in range(6):
        parameter.grad = torch.randn_like(parameter)
        if step == 3:
            held.close(parameter, kept, optimizer)
        if step >= 3:
            held.hold({"p": parameter}, {"p": kept})
        optimizer.step()
    state = optimizer.state[parameter]
    for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"]):
        assert torch.equal(tensor != 0, kept)


# ---- aflora -----------------------------------------------------------------------------------------------------


def afreezing(settings: dict[str, Any] | None = None, **more: Any) -> Training:
    train = {"max_steps": 20, "learning_rate": 0.01, **more.pop("train", {})}
    lifecycle = {"aflora": {"every": 2, "begin": 0.1, "end": 0.7, **(settings or {})}}
    return training({"method": "aflora", "r": 4, "lifecycle": lifecycle}, train, **more)


def factors(run: Training) -> dict[str, Tensor]:
    named = run.adapter.named_tensors()
    return {name: p for name, p in named.items() if name.endswith((".A", ".B"))}


def frozen(run: Training) -> set[str]:
    return {name for name, p in factors(run).items() if not p.requires_grad}


@BOTH
def test_as_many_factors_are_frozen_as_planned_and_all_in_the_end(kind):
    """The floor of r(t)·N, r a cubic from step 2 to step 14; frozen ones stay to the bit and leave the optimizer."""
    run = afreezing(kind=kind)
    N, before, counts = len(factors(run)), dict[str, Tensor](), []
    for report in train_steps(run):
        gone = frozen(run)
        for name, tensor in before.items():
            assert name in gone
            assert torch.equal(factors(run)[name], tensor)
        before |= {name: factors(run)[name].detach().clone() for name in gone}
        if report.step % 2 == 0 or report.step >= 14:
            t = min(max((report.step - 2) / 12, 0), 1)
            assert len(gone) == math.floor((1 - (1 - t) ** 3) * N + 1e-9)
        held_ids = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
        assert held_ids == {id(p) for p in run.adapter.trainable().values()}
        assert {id(p) for p in run.optimizer.state} <= held_ids
        counts.append(len(gone))
    assert counts[0] == 0
    assert counts[13:] == [N] * 7
    assert set(run.adapter.trainable()) == {
        f"{name}.{key}" for name in run.adapter.layers for key in ("b", "d")
    }


def test_those_are_frozen_whose_gradients_are_small_and_steady_by_the_formula():
    run = afreezing({"every": 3}, train={"max_steps": 40})
    lifecycle, names = run.lifecycles[1], list(factors(run))
    mean, spread = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    windows: dict[str, list[Tensor]] = {name: [] for name in names}
    for step in range(1, 13):
        for name, p in factors(run).items():
            p.grad = torch.randn_like(p) * (1 + names.index(name)) if p.requires_grad else None
            if p.requires_grad:
                windows[name].append(p.grad.double().abs())
        lifecycle.gradients(run)
        if step % 3 == 0:
            for name in names:
                if not windows[name]:
                    continue
                window = sum(windows[name]) / 3
                mean[name] = 0.85 * mean[name] + 0.15 * window
                spread[name] = 0.95 * spread[name] + 0.05 * (window - mean[name]).abs()
                windows[name] = []
        left = [name for name in names if name not in frozen(run)]
        scores = {name: (mean[name] * spread[name]).mean().item() for name in left if step >= 3}
        run.step = step
        lifecycle.stepped(run)
        gone = frozen(run) & set(left)
        for name in set(left) - gone if step % 3 == 0 else ():
            assert lifecycle._score(name).item() == pytest.approx(scores[name], rel=1e-4)
        if gone:
            assert max(scores[name] for name in gone) < min(scores[name] for name in set(left) - gone)
    assert 0 < len(frozen(run)) < len(names)


def test_micro_batches_do_not_change_what_is_frozen():
    rows = Rows()

    def course(micro_batch_size: int) -> list[set[str]]:
        run = afreezing(train={"batch_size": 6, "micro_batch_size": micro_batch_size}, rows=rows)
        return [frozen(run) for _ in train_steps(run)]

    assert course(6) == course(2)


def test_a_run_goes_on_with_the_same_frozen_factors_and_optimizer(tmp_path):
    rows = Rows()
    run, steps = afreezing(rows=rows), None
    for report in train_steps(run):
        if report.step == 7:
            steps = checkpoint.save(tmp_path, run, {})
            then = frozen(run)
            assert 0 < len(then) < len(factors(run))
    again = afreezing(rows=rows)
    checkpoint.restore(steps, again)
    assert frozen(again) == then
    list(train_steps(again))
    for name, tensor in run.adapter.named_tensors().items():
        assert torch.equal(again.adapter.named_tensors()[name], tensor)


@BOTH
def test_aflora_is_saved_as_plain_lora(tmp_path, kind):
    run = afreezing(kind=kind)
    list(train_steps(run))
    x = ids()
    files.save(tmp_path, run.adapter, "the/base", None)
    again = tiny.model(kind)
    put_on(again, tmp_path)
    with torch.no_grad():
        learned = run.model.eval()(x).logits
        assert distance(again(x).logits, learned) < 1e-6
        assert distance(tiny.model(kind)(x).logits, learned) > 1e-3


def test_nothing_of_x_is_kept_for_a_frozen_a():
    """What backward keeps of a layer is A·x, r numbers a token."""
    run = afreezing()
    layer = run.adapter.layers["model.layers.0.mlp.down_proj"]
    with torch.no_grad():
        layer.delta.b.normal_()
    x, kept = torch.randn(7, 48), []
    for trains in (True, False):
        layer.delta.A.requires_grad_(trains)
        shapes: list[tuple[int, ...]] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, shapes=shapes: shapes.append(tuple(t.shape)), lambda t: t
        ):
            layer(x)
        kept.append((7, 48) in shapes)
    assert kept == [True, False]


# ---- dropbp -----------------------------------------------------------------------------------------------------

KINDS = ["llama", "gpt2", "mixtral", "gemma2", "gpt_neox", "cohere", "qwen3", "olmo2", "phi3"]


def dropping(rate: float = 0.5, kind: str = "llama", **more: Any) -> Training:
    train = {"max_steps": 12, "learning_rate": 0.01, **more.pop("train", {})}
    adapter = {"r": 4, "lifecycle": {"dropbp": {"rate": rate}}, **more.pop("adapter", {})}
    return training(adapter, train, kind=kind, **more)


def lifecycle_of(run: Training) -> dropbp.DropBP:
    return next(each for each in run.lifecycles if isinstance(each, dropbp.DropBP))


def drop(run: Training, *which: int) -> None:
    """Drop these branches in the next step."""
    dropped = torch.zeros(len(lifecycle_of(run).branches), dtype=torch.bool)
    dropped[list(which)] = True
    lifecycle_of(run).restore({"dropped": dropped})


@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_branch_computes_the_same_to_the_bit_and_has_no_gradient(kind):
    sizes = {"pad_token_id": 0} if kind == "phi3" else {}
    run = dropping(kind=kind, **sizes)
    with torch.no_grad():
        for delta in run.adapter.deltas.values():
            delta.B.normal_(std=0.1)
    lifecycle, names = lifecycle_of(run), dict(run.model.named_modules())
    assert len(lifecycle.branches) == 4
    drop(run)
    whole = loss_of(run, run.model, 0)
    for which in range(4):
        drop(run, which)
        run.optimizer.zero_grad()
        loss = loss_of(run, run.model, 0)
        loss.backward()
        assert torch.equal(loss, whole)
        inside = next(name for name, module in names.items() if module is lifecycle.branches[which])
        for name, p in run.adapter.trainable().items():
            assert (p.grad is None) == name.startswith(f"{inside}."), name


def test_gradients_of_the_others_are_those_of_a_branch_that_is_detached():
    """As the paper has it: x + detach(h). Written out for one branch by a hook of this test."""
    run = dropping()
    with torch.no_grad():
        for delta in run.adapter.deltas.values():
            delta.B.normal_(std=0.1)
    for which in range(4):
        found = []
        for detaches in (False, True):
            drop(run, *([] if detaches else [which]))
            branch = lifecycle_of(run).branches[which]
            handle = branch.register_forward_hook(detached) if detaches else None
            run.optimizer.zero_grad()
            loss_of(run, run.model, 0).backward()
            found.append({name: p.grad for name, p in run.adapter.trainable().items()})
            if handle:
                handle.remove()
        for name, gradient in found[0].items():
            assert gradient is None or torch.equal(gradient, found[1][name])


def detached(module: nn.Module, inputs: Any, output: Any) -> Any:
    return (output[0].detach(), *output[1:]) if isinstance(output, tuple) else output.detach()


def test_as_many_branches_are_dropped_on_average_as_asked_and_never_all_that_learn():
    learning = torch.rand(9) < 0.7
    learning[0] = True
    for rate in (0.2, 0.8):
        lots = torch.rand(4000, 9)
        dropped = torch.stack([dropbp.drawn(each, rate, learning) for each in lots])
        assert not dropped[:, learning].all(1).any()
        expected = rate * 9 - rate ** int(learning.sum())
        spread = (9 * rate * (1 - rate) / 4000) ** 0.5
        assert dropped.sum(1).double().mean().item() == pytest.approx(expected, abs=5 * spread)


def test_one_branch_that_learns_is_left_even_where_only_some_layers_are_adapted():
    run = dropping(0.99, adapter={"target_modules": ("layers.1.mlp.up_proj",)})
    before = run.adapter.deltas["model.layers.1.mlp.up_proj"].B.detach().clone()
    assert lifecycle_of(run).learning.tolist() == [False, False, False, True]
    reports = list(train_steps(run))
    assert all(report.grad_norm > 0 for report in reports)
    assert not torch.equal(run.adapter.deltas["model.layers.1.mlp.up_proj"].B, before)


def test_a_dropped_branch_does_not_move_at_all_not_even_by_momentum():
    run = dropping(train={"weight_decay": 0.1, "micro_batch_size": 2})
    lifecycle, waited = lifecycle_of(run), 0
    before = {name: p.detach().clone() for name, p in run.adapter.trainable().items()}
    gone = list(lifecycle._chosen())
    for report in train_steps(run):
        still = {id(p) for branch in gone for p in branch.parameters()}
        for name, p in run.adapter.trainable().items():
            if id(p) in still:
                assert torch.equal(p, before[name])
                waited += 1
            elif report.step > 2 and name.endswith(".B"):
                assert not torch.equal(p, before[name])
        before = {name: p.detach().clone() for name, p in run.adapter.trainable().items()}
        gone = list(lifecycle._chosen())
    assert waited


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_backward_pass_of_what_is_dropped_is_saved(checkpointing):
    """Counted operations of forward and backward: what is saved is the backward pass of the dropped branches."""
    run = dropping(train={"gradient_checkpointing": checkpointing})

    def cost(*which: int) -> int:
        drop(run, *which)
        run.optimizer.zero_grad()
        counter = FlopCounterMode(display=False)
        with counter:
            loss_of(run, run.model, 0).backward()
        return counter.get_total_flops()

    none = cost()
    singly = [none - cost(which) for which in range(4)]
    assert min(singly[2:]) > 0.1 * none / 4
    drop(run)
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        loss_of(run, run.model, 0)
    assert cost(0, 1, 2) < none - 0.5 * sum(singly[:3])
    assert cost(0, 1, 2) >= forward.get_total_flops()


def test_recomputed_activations_are_those_of_the_same_branches():
    """With and without gradient checkpointing the same gradients."""
    rows, found = Rows(), []
    for checkpointing in (False, True):
        run = dropping(rows=rows, train={"gradient_checkpointing": checkpointing})
        found.append([report.grad_norm for report in train_steps(run)])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_nothing_is_dropped_where_it_is_evaluated():
    run = dropping(0.9)
    drop(run, 0, 1, 2)
    run.model.eval()
    loss_of(run, run.model, 0).backward()
    assert all(p.grad is not None for p in run.adapter.trainable().values())


def test_the_branches_follow_from_the_seed_and_go_on_from_a_checkpoint(tmp_path: Path):
    rows, courses = Rows(), []
    for seed in (1, 1, 2):
        run = dropping(rows=rows, train={"seed": seed})
        courses.append([lifecycle_of(run).state()["dropped"].tolist() for _ in train_steps(run)])
    assert courses[0] == courses[1] != courses[2]
    assert len({str(each) for each in courses[0]}) > 3


@pytest.mark.parametrize("kind", ["bloom"])
def test_a_model_that_adds_the_residual_inside_of_a_branch_is_refused(kind):
    with pytest.raises(UserError, match="the residual inside of a branch"):
        dropping(kind=kind, adapter={"target_modules": ("query_key_value",)}, n_layer=2, n_head=4)
