"""Methods that turn the inputs of W0: R is orthogonal, is its definition in float64, and PEFT's."""

import random

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_cli import parts
from lora_cli.adapter.delta import Place
from lora_cli.adapter.layer import Adapted
from lora_cli.adapter.orthogonal import Turned, cayley
from lora_cli.adapter.plan import view_of
from lora_cli.adapter.seed import generator_of
from lora_cli.adapter.start import Start
from lora_cli.methods.delta.oft import across
from tests.training import distance

IN, OUT, R = 16, 20, 4
TURNS = {"hra": {}, "oft": {"factors": 1}, "oft of 2": {"factors": 2}, "oft of 3": {"factors": 3}}


@pytest.fixture(autouse=True)
def _other_numbers_in_every_session():
    torch.manual_seed(random.getrandbits(48))


def layer(name: str, kind: str = "linear", size: float = 0.5, scale: float = 1.0) -> Adapted:
    module = nn.Linear(IN, OUT) if kind == "linear" else Conv1D(OUT, IN)
    for tensor in module.parameters():
        nn.init.normal_(tensor)
    base = view_of(module.requires_grad_(False))[1]
    made = parts.load("delta", name.partition(" ")[0]).make(Place(base, R, scale), **TURNS[name])
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * size)
    return Adapted(base, made)


def turn(delta: Turned) -> Tensor:
    """R in float64."""
    return delta.turn().double() + torch.eye(IN, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("name", TURNS)
def test_r_is_orthogonal_and_rows_stay_what_they_are_to_one_another(name, kind):
    made = layer(name, kind)
    R_ = turn(made.delta)
    torch.testing.assert_close(R_.t() @ R_, torch.eye(IN, dtype=torch.float64), atol=1e-5, rtol=0)
    W0, W = made.base.weight().double(), made.merged_weight().double()
    assert distance(W @ W.t(), W0 @ W0.t()) < 1e-5
    assert distance(W, W0) > 0.1
    assert distance(W, W0 @ R_) < 1e-6


@pytest.mark.parametrize("name", TURNS)
def test_dropout_leaves_w0_all_of_x(name):
    made = layer(name, scale=0.7)
    made.delta.dropout = nn.Dropout(0.5)
    x = torch.randn(9, IN)
    torch.manual_seed(1)
    found = made(x)
    torch.manual_seed(1)
    expected = made.base.module(x) + made.delta.dropped(x) @ made.delta.weight().t()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_cayley_is_its_definition():
    entries = torch.randn(3, 10)
    for change, each in zip(cayley(entries, 5), entries, strict=True):
        Q = torch.zeros(5, 5, dtype=torch.float64)
        place = 0
        for row in range(5):
            for column in range(row + 1, 5):
                Q[row, column], Q[column, row] = each[place], -each[place]
                place += 1
        identity = torch.eye(5, dtype=torch.float64)
        assert distance(change + identity, (identity - Q) @ torch.linalg.inv(identity + Q)) < 1e-5


def test_a_turn_of_a_millionth_is_as_exact_as_a_large_one():
    """From R itself, whose entries are near 1, there would be one digit left of it."""
    entries = torch.randn(6) * 1e-6
    Q = torch.zeros(4, 4, dtype=torch.float64)
    Q[tuple(torch.triu_indices(4, 4, 1))] = entries.double()
    Q = Q - Q.t()
    identity = torch.eye(4, dtype=torch.float64)
    assert distance(cayley(entries, 4), (identity - Q) @ torch.linalg.inv(identity + Q) - identity) < 1e-6


def test_hra_is_its_chain_of_reflections():
    made = layer("hra").delta
    chain = torch.eye(IN, dtype=torch.float64)
    for u in made.U.detach().double():
        chain = chain @ (torch.eye(IN, dtype=torch.float64) - 2 * torch.outer(u, u) / (u @ u))
    assert distance(turn(made), chain) < 1e-6
    B, A = made.factors()
    assert A.shape == (R, IN)
    assert distance(B @ A, made.weight()) < 1e-5


def test_reflections_start_in_pairs_and_learn_at_once():
    made = layer("hra")
    with torch.no_grad():
        parts.load("init", "pairs").init(made.delta, Start(made.base, generator_of(0, "x")))
    assert made.delta.turn().abs().max() < 1e-6
    assert torch.equal(made.delta.U[0], made.delta.U[1])
    assert not torch.equal(made.delta.U[0], made.delta.U[2])
    made(torch.randn(5, IN)).square().sum().backward()
    assert (made.delta.U.grad.abs().sum(1) > 0).all()


def test_oft_turns_within_blocks():
    made = layer("oft").delta
    changes = cayley(made.Q.detach()[0].double(), R)
    expected = torch.block_diag(*changes).t() + torch.eye(IN, dtype=torch.float64)
    assert distance(turn(made), expected) < 1e-6


def test_enough_factors_take_every_input_to_every_other():
    assert (turn(layer("oft of 3").delta).abs() > 1e-12).all(), (
        "16 inputs in blocks of 4, halves of 2: 3 levels"
    )
    assert (turn(layer("oft").delta) == 0).sum() == IN * IN - IN * R


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_factor_has_its_blocks_across_two_half_blocks(level):
    """By hand: half-blocks of 2 inputs; number p meets number p + 2^level."""
    blocks, x = torch.randn(4, R, R, dtype=torch.float64), torch.randn(IN, dtype=torch.float64)
    halves, found = x.view(8, 2), across(x, blocks, level).view(8, 2)
    firsts = [p for p in range(8) if not p >> level & 1]
    for number, p in enumerate(firsts):
        q = p + 2**level
        expected = torch.cat([halves[p], halves[q]]) @ blocks[number]
        torch.testing.assert_close(torch.cat([found[p], found[q]]), expected)


@pytest.mark.oracle
def test_factors_are_pefts_butterflies():
    """PEFT computes more than one factor on a GPU only; its permutations and their order are plain Python."""
    boft = pytest.importorskip("peft.tuners.boft.layer")
    made = layer("oft of 3").delta
    theirs = torch.eye(IN, dtype=torch.float64)
    for level, blocks in enumerate(cayley(made.Q.detach().double(), R)):
        order = boft.BOFTLayer.block_butterfly_perm(made, IN, IN // R // 2**level, R // 2, 2)
        P = boft.BOFTLayer.perm2mat(made, order).double()
        theirs = P @ (torch.block_diag(*blocks) + torch.eye(IN)) @ P.t() @ theirs
    assert distance(turn(made), theirs.t()) < 1e-6, "which turns x as a row"
