"""Gates that learn from other rows than the factors they stand between: who learns from which, and the penalty."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lora_cli.data.example import Example
from lora_cli.errors import UserError
from lora_cli.train.loop import Training, train_steps
from lora_cli.train.loss import loss_sum
from tests import tiny
from tests.training import Rows, batch_of, distance, fresh, training

BOTH = pytest.mark.parametrize("kind", ["llama", "gpt2"])


def begun(
    kind: str = "llama", rows: Rows | None = None, train: dict[str, Any] | None = None, **settings: Any
) -> Training:
    """A run with open gates, so that everything has a gradient from the first step on."""
    run = training(
        {"method": "bilora", "lifecycle": {"bilora": settings}},
        {"learning_rate": 0.01, **(train or {})},
        kind=kind,
        rows=rows,
    )
    generator = torch.Generator().manual_seed(3)
    for delta in run.adapter.deltas.values():
        delta.get_parameter("E").data.copy_(torch.randn(len(delta.get_parameter("E")), generator=generator))
    return run


def seen_by_the_optimizer(run: Training) -> dict[str, Tensor]:
    """The gradients of the next step, which is taken."""
    seen: dict[str, Tensor] = {}
    run.lifecycles[-1].gradients = lambda run: seen.update(
        {n: p.grad.clone() for n, p in run.trained.items()}
    )
    next(train_steps(run))
    return seen


def of_rows(run: Training, rows: list[int]) -> dict[str, Tensor]:
    """∂ of the mean loss on some rows, by autograd through the model alone."""
    parameters, shown = run.adapter.trainable(), run.rows
    run.rows = lambda step: rows
    tokens = run.examples.trained_counts[rows].sum()
    loss = loss_sum(run.model, batch_of(run, 0), torch.device("cpu")) / tokens
    run.rows = shown
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def of_penalty(run: Training, weight: float) -> dict[str, Tensor]:
    """∂ of γ·mean over layers of (‖BᵀB − I‖² + ‖AAᵀ − I‖²) in float64: 4·B·(BᵀB − I) and 4·(AAᵀ − I)·A."""
    found: dict[str, Tensor] = {}
    count = len(run.adapter.deltas)
    for name, delta in run.adapter.deltas.items():
        A, B = (delta.get_parameter(key).detach().double() for key in "AB")
        eye = torch.eye(len(A), dtype=torch.float64)
        found[f"{name}.A"] = 4 * weight / count * (A @ A.t() - eye) @ A
        found[f"{name}.B"] = 4 * weight / count * B @ (B.t() @ B - eye)
    return found


@BOTH
@pytest.mark.parametrize("micro", [1, 3, "auto"])
def test_gates_learn_from_the_second_part_of_the_rows_alone_and_factors_from_the_first_and_the_penalty(
    kind, micro
):
    run = begun(kind, orthogonality=0.1, train={"micro_batch_size": micro})
    first, second = run.rows(0), run.outer_rows(0)
    inner, outer, penalty = of_rows(run, first), of_rows(run, second), of_penalty(run, 0.1)
    seen = seen_by_the_optimizer(run)
    for name, gradient in seen.items():
        of = outer[name] if name.endswith(".E") else inner[name].double() + penalty[name]
        assert distance(gradient, of) < 1e-3, name
    assert not set(first) & set(second)


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_no_row_is_learned_from_on_both_sides_in_any_step(share):
    rows = Rows(24)
    run = begun(rows=rows, share=share, train={"max_steps": 20})
    first = {row for step in range(20) for row in run.rows(step)}
    second = {row for step in range(20) for row in run.outer_rows(step)}
    assert len(second) == share * 24
    assert len(first) == 24 - len(second)
    assert not first & second


@pytest.mark.parametrize("side", ["rows", "outer_rows"])
def test_other_words_on_one_side_change_nothing_on_the_other_to_the_bit(side):
    """Stronger than a bookkeeping of rows: what the gates read does not reach the factors, and the other way round."""
    rows, generator = Rows(24), fresh()
    before = seen_by_the_optimizer(begun(rows=rows))
    run = begun(rows=rows)
    for row in getattr(run, side)(0):
        count = len(rows[row].input_ids)
        others = torch.randint(5, tiny.VOCABULARY, (count,), generator=generator).tolist()
        rows[row] = Example(tuple(others), rows[row].trained, rows[row].where)
    after = seen_by_the_optimizer(run)
    for name, gradient in after.items():
        is_gate = name.endswith(".E")
        assert torch.equal(gradient, before[name]) == (is_gate == (side == "rows")), name


def test_the_penalty_makes_the_factors_orthonormal_and_none_leaves_them():
    apart = []
    for weight in (0.0, 3.0):
        run = begun(orthogonality=weight, train={"max_steps": 150, "learning_rate": 0.02})
        list(train_steps(run))
        deltas = run.adapter.deltas.values()
        grams = [delta.A @ delta.A.t() for delta in deltas] + [delta.B.t() @ delta.B for delta in deltas]
        apart.append(max((gram - torch.eye(len(gram))).norm().item() for gram in grams))
    assert apart[1] < 0.2
    assert apart[0] > 5 * apart[1]


def test_from_closed_gates_everything_has_moved_after_two_steps():
    run = training({"method": "bilora"}, {"learning_rate": 0.01, "max_steps": 12})
    before = {name: p.detach().clone() for name, p in run.adapter.trainable().items()}
    for report in train_steps(run):
        if report.step == 2:
            break
    assert not any(torch.equal(p, before[name]) for name, p in run.adapter.trainable().items())


def test_rows_that_cannot_be_shared_out_are_refused():
    with pytest.raises(UserError, match="0 of 4 training rows are to be held out"):
        next(train_steps(begun(rows=Rows(4), share=0.1)))


@pytest.mark.parametrize(
    ("adapter", "told"),
    [
        ({"lifecycle": "bilora"}, "needs delta.gated"),
        ({"method": "bilora", "trainable": "only_core"}, "with A and B frozen"),
        ({"method": "bilora", "rank": "adalora"}, "from the same rows"),
        ({"method": "bilora", "dropout": 0.1, "lifecycle": ["bilora", "r_drop"]}, "rows of one part only"),
    ],
)
def test_what_would_mix_the_two_sides_is_refused(adapter, told):
    with pytest.raises(UserError, match=told):
        training(adapter)
