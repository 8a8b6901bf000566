"""The learning rate over a run, and the groups of the optimizer."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lora_cli.presets import Method
from lora_cli.recipe.schema import TrainRecipe
from lora_cli.train import optim

SCHEDULERS = ("constant", "linear", "cosine", "inverse_sqrt")


@given(
    scheduler=st.sampled_from(SCHEDULERS),
    total=st.integers(1, 300),
    warmup=st.integers(0, 50),
    floor=st.floats(0, 1e-4),
)
def test_rate_rises_to_the_peak_then_never_rises_again_nor_falls_below_the_floor(
    scheduler, total, warmup, floor
):
    train = TrainRecipe(
        learning_rate=1e-3, lr_scheduler=scheduler, warmup_steps=warmup, min_learning_rate=floor
    )
    rates = [optim.learning_rate(step, total, train) for step in range(total)]
    rising, after = rates[:warmup], rates[warmup:]
    assert all(0 < rate <= 1e-3 for rate in rates)
    assert rising == sorted(rising)
    assert after == sorted(after, reverse=True)
    assert all(rate >= floor for rate in after)
    if after:
        assert after[0] == pytest.approx(1e-3)


def made(trainable: dict[str, nn.Parameter], train: TrainRecipe) -> torch.optim.Optimizer:
    """The optimizer of plain LoRA over these tensors."""
    plan = SimpleNamespace(method=Method(name="lora"))
    return optim.make(SimpleNamespace(trainable=lambda: trainable, plan=plan), train)


def test_schedules_have_their_closed_form():
    def rate(scheduler: str, step: int) -> float:
        settings = {
            "learning_rate": 1.0,
            "lr_scheduler": scheduler,
            "warmup_ratio": 0.1,
            "min_learning_rate": 0.2,
        }
        return optim.learning_rate(step, 100, TrainRecipe(**settings))

    for step in range(10):
        assert rate("cosine", step) == pytest.approx((step + 1) / 10)
    for step in range(10, 100):
        done = (step - 10) / 90
        assert rate("constant", step) == 1.0
        assert rate("linear", step) == pytest.approx(0.2 + 0.8 * (1 - done))
        assert rate("cosine", step) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * done)))
        assert rate("inverse_sqrt", step) == pytest.approx(0.2 + 0.8 * math.sqrt(10 / step))


def test_every_trainable_tensor_is_in_exactly_one_group_and_vectors_are_not_decayed():
    trainable = {
        name: nn.Parameter(torch.randn(*shape))
        for name, shape in {"A": (2, 3), "b": (4,), "B": (3, 2)}.items()
    }
    optimizer = made(trainable, TrainRecipe(weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 3
    assert {name: decay[id(p)] for name, p in trainable.items()} == {"A": 0.1, "B": 0.1, "b": 0.0}


def test_restored_optimizer_goes_on_to_the_bit():
    def fresh():
        torch.manual_seed(0)
        trainable = {"A": nn.Parameter(torch.randn(5, 3)), "b": nn.Parameter(torch.randn(4))}
        return trainable, made(trainable, TrainRecipe(weight_decay=0.1))

    def steps(trainable, optimizer, numbers):
        for number in numbers:
            for parameter in trainable.values():
                parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            optimizer.step()

    whole, optimizer = fresh()
    steps(whole, optimizer, range(6))
    first, optimizer = fresh()
    steps(first, optimizer, range(3))
    state = {key: value.clone() for key, value in optim.named_state(optimizer, first).items()}
    second, optimizer = fresh()
    with torch.no_grad():
        for name in second:
            second[name].copy_(first[name])
    optim.restore_state(optimizer, second, state)
    steps(second, optimizer, range(3, 6))
    assert all(torch.equal(whole[name], second[name]) for name in whole)
