"""AdaLoRA keeps its budget exactly, by an importance and a penalty that are those of the paper and of PEFT."""

import json
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_cli.adapter import budget, files
from lora_cli.adapter.portable import saved_form
from lora_cli.methods.rank import adalora
from lora_cli.methods.rank.adalora import AdaLoRA
from lora_cli.train.loop import Training, train_steps
from tests import tiny
from tests.adapters import ids, put_on
from tests.training import Rows, distance, training

R, INITIAL = 4, 6
BETA = 0.85


@pytest.fixture(autouse=True)
def _other_numbers_in_every_session():
    torch.manual_seed(random.getrandbits(48))


def begun(rank: dict[str, Any] | None = None, train: dict[str, Any] | None = None, **more: Any) -> Training:
    """A run of AdaLoRA; a decision every 3 steps unless said otherwise."""
    adapter = {"method": "adalora", "rank": {"adalora": {"every": 3, **(rank or {})}}}
    adapter |= more.pop("adapter", {})
    return training(adapter, {"max_steps": 20, "learning_rate": 0.01, **(train or {})}, **more)


def controller(run: Training) -> AdaLoRA:
    (found,) = run.lifecycles
    assert isinstance(found, AdaLoRA)
    return found


def gates(run: Training) -> dict[str, Tensor]:
    return {name: delta.get_parameter("E").detach().clone() for name, delta in run.adapter.deltas.items()}


def is_open(run: Training) -> Tensor:
    """Which gates of all layers are open."""
    return torch.cat(list(gates(run).values())) != 0


@torch.no_grad()
def close(run: Training, budget: int) -> None:
    controller(run)._close(run, budget)


def fill(run: Training, gradients: bool = True) -> None:
    """Random tensors, all gates open, and random gradients."""
    with torch.no_grad():
        for parameter in run.adapter.trainable().values():
            parameter.copy_(torch.randn_like(parameter))
            parameter.grad = torch.randn_like(parameter) if gradients else torch.zeros_like(parameter)


# ---- the budget -----------------------------------------------------------------------------------------------------


def planned(
    step: int, steps: int, first: int, last: int, warmup: float, final: float, every: int
) -> int | None:
    """The schedule of the paper, eq. 12; None between two decisions."""
    begin, end = round(warmup * steps), round((1 - final) * steps)
    if step >= end:
        return last
    if step <= begin or (step - begin) % every:
        return None
    return round(last + (first - last) * (1 - (step - begin) / (end - begin)) ** 3)


@pytest.mark.parametrize(
    ("rank", "steps"),
    [
        ({}, 20),
        ({"warmup": 0.0, "final": 0.0, "every": 1}, 11),
        ({"warmup": 0.3, "final": 0.5, "every": 2}, 15),
        ({"warmup": 0.9, "final": 0.05}, 4),
        ({"every": 50}, 9),
        ({}, 1),
    ],
)
def test_as_many_gates_are_open_as_planned_after_every_decision_and_r_a_layer_at_the_end(rank, steps):
    run = begun(rank, {"max_steps": steps}, adapter={"rank_pattern": {"q_proj": 2, "up_proj": 1}})
    asked = {"warmup": 0.1, "final": 0.3, "every": 3, **rank}
    wanted = [2 if "q_proj" in name else 1 if "up_proj" in name else R for name in run.adapter.deltas]
    first = sum({R: INITIAL, 2: 3, 1: 2}[r] for r in wanted)
    assert first == len(is_open(run)) == sum(spec.r for spec in run.adapter.plan.layers)
    decisions = 0
    for report in train_steps(run):
        budget = planned(report.step, steps, first, sum(wanted), **asked)
        if budget is not None:
            decisions += 1
            assert int(is_open(run).sum()) == budget
    assert decisions
    assert int(is_open(run).sum()) == sum(wanted)


@given(r=st.integers(1, 256), hundredths=st.integers(100, 500))
def test_the_rank_that_is_left_is_the_one_that_was_asked_for(r, hundredths):
    """Whatever the start is rounded to."""
    initial = hundredths / 100
    first = adalora.initial_r(r, initial)
    assert first >= max(r, initial * r - 1e-9)
    assert budget.kept(first, initial) == r


@pytest.mark.parametrize("budget", [1, 5, 30, 84])
def test_where_all_components_are_equally_important_the_budget_is_kept_too(budget):
    run = begun()
    fill(run, gradients=False)
    close(run, budget)
    expected = torch.arange(len(is_open(run))) < budget
    assert torch.equal(is_open(run), expected), "the first ones"


def test_at_the_end_the_same_gates_stay_open_whatever_the_gradient_says():
    run = begun({"warmup": 0.1, "final": 0.5, "every": 1})
    kept: Tensor | None = None
    for report in train_steps(run):
        if report.step < 10:
            continue
        kept = is_open(run) if kept is None else kept
        assert torch.equal(is_open(run), kept)
        if report.step == 12:  # what is closed becomes the most important by far
            for average in controller(run).averages.values():
                assert torch.isfinite(average).all()
            with torch.no_grad():
                for delta in run.adapter.deltas.values():
                    delta.A.mul_(1 + 100 * (delta.get_parameter("E") == 0)[:, None])


def test_a_closed_gate_learns_until_the_next_decision_which_may_open_it():
    """So that what was closed too early can come back: section 4 of the paper, and the authors' code."""
    run = begun({"every": 2, "warmup": 0.0, "final": 0.1})
    rank, name = controller(run), next(iter(run.adapter.deltas))
    delta = run.adapter.deltas[name]
    fill(run)
    with torch.no_grad():
        delta.get_parameter("E").grad.zero_()
        delta.A.grad[0], delta.B.grad[:, 0] = 0, 0
    run.step = 2
    rank.stepped(run)
    assert delta.get_parameter("E")[0] == 0, "closed"
    with torch.no_grad():
        delta.get_parameter("E")[0] = 0.1
        delta.get_parameter("E").grad[0] = 1e4
    run.step = 3
    rank.stepped(run)
    assert delta.get_parameter("E")[0] == 0.1, "left alone between two decisions"
    run.step = 4
    rank.stepped(run)
    assert delta.get_parameter("E")[0] == 0.1, "open"


def test_a_run_too_short_for_a_decision_between_warmup_and_end_is_refused():
    with pytest.raises(ValueError, match="'warmup' and 'final' leave no step"):
        adalora.Settings(warmup=0.5, final=0.5)


def test_micro_batches_do_not_change_which_gates_are_open():
    rows = Rows()

    def course(micro_batch_size: int) -> list[Tensor]:
        train = {"max_steps": 12, "batch_size": 6, "micro_batch_size": micro_batch_size}
        run = begun({"every": 1, "warmup": 0.0, "final": 0.2}, train, rows=rows)
        return [is_open(run) for _ in train_steps(run)]

    whole = course(6)
    assert len({tuple(each.tolist()) for each in whole}) > 3
    for micro_batch_size in (1, 2, 4):
        assert all(torch.equal(a, b) for a, b in zip(whole, course(micro_batch_size), strict=True))


# ---- importance and penalty ----------------------------------------------------------------------------------------


def test_importance_is_the_formula_entry_by_entry():
    """Sensitivity |w·∂w| and its uncertainty, each an exponential average; their product; means over a component."""
    run = begun({"every": 100})
    rank = controller(run)
    seen: list[dict[str, tuple[np.ndarray, np.ndarray]]] = []
    for step in range(1, 5):
        fill(run)
        named = run.adapter.trainable()
        seen.append(
            {name: (p.detach().double().numpy().copy(), p.grad.double().numpy()) for name, p in named.items()}
        )
        run.step = step
        rank.stepped(run)
    for layer, delta in run.adapter.deltas.items():
        s: dict[str, np.ndarray] = {}
        for key in "ABE":
            shape = tuple(delta.get_parameter(key).shape)
            mean, spread = np.zeros(shape), np.zeros(shape)
            for step in seen:
                w, g = step[f"{layer}.{key}"]
                for at in np.ndindex(shape):
                    importance = abs(w[at] * g[at])
                    mean[at] = BETA * mean[at] + (1 - BETA) * importance
                    spread[at] = BETA * spread[at] + (1 - BETA) * abs(importance - mean[at])
            s[key] = mean * spread
        expected = [s["E"][k] + np.mean(s["A"][k, :]) + np.mean(s["B"][:, k]) for k in range(INITIAL)]
        assert distance(rank._scores(layer), torch.tensor(expected)) < 1e-5


def test_importance_of_a_step_is_that_of_the_summed_gradient():
    """Of the weight after the step and the gradient of all its micro-batches, as in the authors' loop."""
    run = begun({"every": 100}, {"batch_size": 6, "micro_batch_size": 2, "max_steps": 1, "optimizer": "sgd"})
    before = {name: p.detach().clone() for name, p in run.adapter.trainable().items()}
    list(train_steps(run))
    for name, parameter in run.adapter.trainable().items():
        gradient = (before[name] - parameter.detach()) / 0.01
        expected = (1 - BETA) * (parameter.detach() * gradient).abs()
        found = controller(run).averages[f"{name}|mean"]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_a_gradient_that_overflowed_does_not_stay_in_the_averages():
    run = begun()
    fill(run)
    for parameter in run.adapter.trainable().values():
        parameter.grad.flatten()[:3] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    run.step = 1
    controller(run).stepped(run)
    assert all(torch.isfinite(average).all() for average in controller(run).averages.values())


def test_penalty_is_the_mean_norm_over_all_factors_and_keeps_components_apart():
    run = begun({"orthogonality": 0.3})
    fill(run)
    found = controller(run).penalty(run)
    factors: list[Tensor] = []
    norms: list[Tensor] = []
    for delta in run.adapter.deltas.values():
        for rows in (delta.A, delta.B.t()):
            leaf = rows.detach().double().requires_grad_()
            gram = torch.stack([torch.stack([(a * b).sum() for b in leaf]) for a in leaf])
            norms.append((gram - torch.eye(INITIAL)).square().sum().sqrt())
            factors.append(leaf)
    expected = 0.3 * sum(norms) / len(norms)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    run.optimizer.zero_grad()
    found.backward()
    expected.backward()
    mine = [g for delta in run.adapter.deltas.values() for g in (delta.A.grad, delta.B.grad.t())]
    for gradient, leaf in zip(mine, factors, strict=True):
        assert distance(gradient, leaf.grad) < 1e-5
    assert controller(begun({"orthogonality": 0.0})).penalty(run) is None


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_penalty_is_added_once_a_step(micro_batch_size):
    """At the start all gates are closed: the loss has no gradient for A and B, only the penalty has."""
    run = begun({}, {"optimizer": "sgd", "micro_batch_size": micro_batch_size})
    penalty = controller(run).penalty(run)
    named = {name: p for name, p in run.adapter.trainable().items() if not name.endswith(".E")}
    expected = dict(zip(named, torch.autograd.grad(penalty, list(named.values())), strict=True))
    before = {name: p.detach().clone() for name, p in named.items()}
    next(train_steps(run))
    for name, parameter in named.items():
        torch.testing.assert_close(
            parameter.detach(), before[name] - 0.01 * expected[name], rtol=1e-5, atol=1e-7
        )
    assert is_open(run).all(), "the loss has a gradient for them"


# ---- what is saved --------------------------------------------------------------------------------------------------


def test_what_is_saved_has_the_open_components_only_and_computes_the_same(tmp_path: Path):
    run = begun({"every": 1, "final": 0.4}, {"max_steps": 12})
    list(train_steps(run))
    empty = next(iter(run.adapter.deltas))
    with torch.no_grad():
        run.adapter.deltas[empty].get_parameter("E").zero_()
    counts = {name: max(int((E != 0).sum()), 1) for name, E in gates(run).items()}
    assert len(set(counts.values())) > 1
    x = ids()
    learned = run.model.eval()(x).logits
    assert {spec.name: spec.r for spec in saved_form(run.adapter).plan.layers} == counts
    files.save(tmp_path, run.adapter, "the/base", None)
    again = tiny.model("llama")
    plain = again(x).logits
    loaded = put_on(again, tmp_path)
    assert {name: delta.A.shape[0] for name, delta in loaded.deltas.items()} == counts
    assert distance(again(x).logits, learned) < 1e-6
    assert distance(plain, learned) > 1e-3
    config = json.loads((tmp_path / files.CONFIG).read_text())
    assert config["rank_pattern"]
    assert config["peft_type"] == "LORA"
    stored = files.read(tmp_path).tensors
    assert sum(t.shape[0] for key, t in stored.items() if key.endswith("lora_A.weight")) == sum(
        counts.values()
    )


def test_the_model_starts_as_the_base_and_the_first_step_opens_the_gates():
    run, x = begun(), ids()
    assert torch.equal(run.model.eval()(x).logits, tiny.model("llama")(x).logits)
    assert not is_open(run).any()
    next(train_steps(run))
    assert is_open(run).all()


# ---- PEFT -----------------------------------------------------------------------------------------------------------

peft = pytest.importorskip("peft")


def by_peft(run: Training, **config: Any) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """PEFT's AdaLoRA with the tensors of a run: the model, and its parameters by our names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT about what it was asked for
        settings = {"init_r": INITIAL, "target_r": R, "lora_alpha": 32, "total_step": 100, **config}
        asked = peft.AdaLoraConfig(target_modules="all-linear", **settings)
        model = peft.get_peft_model(tiny.model("llama"), asked).eval()
    theirs: dict[str, nn.Parameter] = {}
    for name, parameter in run.adapter.trainable().items():
        layer, _, key = name.rpartition(".")
        theirs[name] = getattr(model.base_model.model.get_submodule(layer), f"lora_{key}")["default"]
        theirs[name].data.copy_(parameter[:, None] if key == "E" else parameter)
    return model, theirs


@pytest.mark.oracle
def test_forward_is_pefts_but_for_the_hundred_thousandth_that_peft_adds_to_r():
    run = begun()
    fill(run)
    theirs, _ = by_peft(run)
    for name, layer in run.adapter.layers.items():
        module, x = theirs.base_model.model.get_submodule(name), torch.randn(3, layer.base.in_features)
        change = (module(x) - layer.base_layer(x)) * ((INITIAL + 1e-5) / INITIAL)
        assert distance(layer(x) - layer.base_layer(x), change) < 2e-6
        delta = module.get_delta_weight("default") * ((INITIAL + 1e-5) / INITIAL)
        assert distance(layer.delta.weight(), delta.detach()) < 1e-6
        assert layer.delta.scale == 32 / INITIAL, "of the r at the start, whatever is closed later"


@pytest.mark.oracle
def test_decisions_are_pefts():
    """Averages of 6 steps with the same weights and gradients, then the components that 50 are left of."""
    run = begun({"every": 100})
    rank = controller(run)
    model, theirs = by_peft(run, beta1=BETA, beta2=BETA)
    allocator = model.base_model.rankallocator
    for step in range(1, 7):
        fill(run)
        for name, parameter in run.adapter.trainable().items():
            E = name.endswith(".E")
            theirs[name].data.copy_(parameter[:, None] if E else parameter)
            theirs[name].grad = (parameter.grad[:, None] if E else parameter.grad).clone()
        run.step = step
        rank.stepped(run)
        allocator.update_ipt(model.base_model.model)
    close(run, 50)
    allocator.mask_to_budget(model.base_model.model, 50)
    for name, E in gates(run).items():
        assert torch.equal(E, theirs[f"{name}.E"].detach()[:, 0])
    assert int(is_open(run).sum()) == 50


@pytest.mark.oracle
def test_penalty_is_pefts():
    run = begun({"orthogonality": 0.5})
    fill(run)
    model, _ = by_peft(run, orth_reg_weight=0.5)
    x = ids()
    plain = model.base_model.model(input_ids=x, labels=x).loss
    expected = model.base_model(input_ids=x, labels=x).loss - plain
    assert controller(run).penalty(run).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is")
def test_peft_computes_what_we_compute_from_our_files(tmp_path):
    run = begun({"every": 1, "final": 0.4}, {"max_steps": 12})
    list(train_steps(run))
    files.save(tmp_path, run.adapter, "the/base", None)
    x = ids()
    wrapped = peft.PeftModel.from_pretrained(tiny.model("llama"), tmp_path)
    assert distance(wrapped(x).logits, run.model.eval()(x).logits) < 1e-5
