"""Training rows that a method holds out: who reads which, and what learns from them."""

import random
from collections.abc import Collection

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_cli.adapter.lifecycle import Lifecycle, Run
from lora_cli.data.pack import epoch_length, epoch_order
from lora_cli.errors import UserError
from lora_cli.evaluate.loss import held_out_loss
from lora_cli.train.course import Course
from lora_cli.train.loop import Training, train_steps
from lora_cli.train.loss import loss_sum
from tests.test_data_pack import Weighted
from tests.training import Rows, batch_of, distance, training


class Holds(Lifecycle):
    """Holds `count` examples out until step `until`; the tensors with this ending learn from them."""

    def __init__(self, count: int, ending: str = "", until: int = 99) -> None:
        self.count, self.ending, self.until = count, ending, until

    def held_out(self, examples: int, step: int) -> int:
        """So many of however many there are."""
        return self.count if step < self.until else 0

    def outer(self, run: Run) -> Collection[str]:
        """By the end of their names."""
        return [name for name in run.adapter.trainable() if self.ending and name.endswith(self.ending)]


def begun(*holds: Holds, rows: Rows | None = None, **train: object) -> Training:
    run = training({"r": 4}, {"learning_rate": 0.01, **train}, rows=rows)
    with torch.no_grad():
        for delta in run.adapter.deltas.values():
            delta.get_parameter("B").normal_(std=0.1)
    run.lifecycles = holds
    return run


# ---- which rows -------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    count=st.integers(2, 60),
    share=st.floats(0.01, 0.99),
    size=st.integers(1, 9),
    seed=st.integers(0, 2**31 - 1),
)
def test_the_two_sides_of_a_split_have_every_example_once_and_never_one_of_the_other(
    count, share, size, seed
):
    held_out = min(max(round(share * count), 1), count - 1)
    whole = Course([None] * count, seed, size)
    inner, outer = whole.split(held_out)
    for side, length in ((inner, count - held_out), (outer, held_out)):
        for epoch in range(3):
            steps = range(epoch * side.steps_per_epoch, (epoch + 1) * side.steps_per_epoch)
            rows = [row for step in steps for row in side.rows(step)]
            assert len(rows) == len(set(rows)) == length
            assert set(rows) == set(side.among)
    assert {*inner.among, *outer.among} == set(range(count))
    again = Course([None] * count, seed, size).split(held_out)[1]
    assert [again.rows(step) for step in range(5)] == [outer.rows(step) for step in range(5)]


def test_fewer_that_are_held_out_are_some_of_more_and_other_seeds_hold_out_others():
    few, more, other = (
        set(Course([None] * 40, seed, 4).split(count)[1].among) for seed, count in ((1, 5), (1, 9), (2, 9))
    )
    assert few < more != other


def test_epochs_of_a_part_keep_the_weights_of_the_sources():
    weights = (2.0, 0.5, 1.0)
    examples = Weighted([random.randrange(3) for _ in range(90)] + [0, 1, 2], weights)
    among = np.sort(np.random.default_rng(random.getrandbits(32)).permutation(93)[:60])
    members = np.bincount(examples.sources[among], minlength=3)
    epochs = [epoch_order(examples, 7, epoch, among) for epoch in range(4)]
    assert {len(order) for order in epochs} == {epoch_length(examples, among)}
    for order in epochs:
        assert set(order) <= set(among)
        seen = np.bincount(examples.sources[order], minlength=3)
        assert np.abs(seen - members * weights).max() <= 0.5
    everything = np.arange(93)
    assert epoch_order(examples, 7, 3, everything).tolist() == epoch_order(examples, 7, 3).tolist()


def test_a_step_reads_what_is_not_held_out_and_everything_once_nothing_is():
    run = begun(Holds(9, ".A", until=6), max_steps=12)
    kept = run.split(9)[1]
    inner = [row for step in range(6) for row in run.rows(step)]
    assert not set(inner) & set(kept.among)
    assert {row for step in range(6) for row in run.outer_rows(step)} == set(kept.among)
    assert [run.rows(step) for step in (6, 11)] == [run.course.rows(step) for step in (6, 11)]
    assert run.steps_per_epoch == begun(Holds(0)).steps_per_epoch == 6


@pytest.mark.parametrize("count", [24, 30])
def test_a_split_that_leaves_nothing_on_one_side_is_refused(count):
    with pytest.raises(UserError, match=f"{count} of 24 training rows"):
        next(train_steps(begun(Holds(count, ".A"))))


# ---- what learns from them --------------------------------------------------------------------------------------


def of_rows(run: Training, rows: list[int]) -> dict[str, Tensor]:
    """The gradient of the mean loss on some rows, of a run that has not begun, by autograd."""
    parameters = run.adapter.trainable()
    shown = run.rows
    run.rows = lambda step: rows
    loss = (
        loss_sum(run.model, batch_of(run, 0), torch.device("cpu")) / run.examples.trained_counts[rows].sum()
    )
    run.rows = shown
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


@pytest.mark.parametrize("size", [1, 3, "auto"])
def test_what_is_claimed_has_the_gradient_of_held_out_rows_and_all_else_that_of_the_others(size):
    run = begun(Holds(8, ".A"), micro_batch_size=size)
    inner, outer = (of_rows(run, rows) for rows in (run.rows(0), run.outer_rows(0)))
    expected = {name: (outer if name.endswith(".A") else inner)[name] for name in inner}
    seen: dict[str, Tensor] = {}
    run.lifecycles[0].gradients = lambda run: seen.update(
        {name: p.grad.clone() for name, p in run.trained.items()}
    )
    report = next(train_steps(run))
    assert seen.keys() == expected.keys()
    for name, gradient in expected.items():
        assert distance(seen[name], gradient) < 1e-4, name
        assert distance(seen[name], {**outer, **inner}[name] + outer[name]) > 1e-3, "nothing of both"
    rows = [*run.rows(0), *run.outer_rows(0)]
    assert report.tokens == run.examples.lengths[rows].sum()
    assert report.trained_tokens == run.examples.trained_counts[run.rows(0)].sum()


def test_rows_that_are_held_out_without_a_claim_change_nothing_but_the_rows():
    rows = Rows()
    held, free = (begun(Holds(count), rows=rows) for count in (8, 0))
    free.rows = held.rows
    for name, parameter in held.adapter.trainable().items():
        free.adapter.trainable()[name].data.copy_(parameter)
    assert [each.loss for each in train_steps(held)] == [each.loss for each in train_steps(free)]


# ---- the loss on them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, "auto"])
def test_the_loss_on_what_is_held_out_is_that_of_an_evaluation(size):
    run = training({"r": 4, "dropout": 0.5}, {"micro_batch_size": size})
    run.lifecycles = (Holds(7),)
    nn.init.normal_(next(iter(run.adapter.deltas.values())).get_parameter("B"))
    kept = [run.examples[row] for row in run.split(7)[1].among]
    found = run.held_out_loss()
    assert run.model.training
    assert not found.requires_grad
    expected = held_out_loss(run.model, kept, device=torch.device("cpu"), max_tokens=64, pad_id=0)
    assert found.item() == pytest.approx(expected.loss, rel=1e-5)
