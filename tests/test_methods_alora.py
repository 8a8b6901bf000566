"""alora: components that move from layer to layer, against ablation in float64, and what another rank means."""

import copy
import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_cli.adapter import files
from lora_cli.adapter.resize import fresh, put
from lora_cli.adapter.seed import generator_of
from lora_cli.data.pack import micro_batches
from lora_cli.methods.rank import alora
from lora_cli.train import checkpoint
from lora_cli.train.loop import Training, train_steps
from lora_cli.train.loss import loss_sum
from tests import tiny
from tests.adapters import ids
from tests.test_methods_rank import R, begun, logits_of, put_back, same_courses
from tests.test_train_held_out import of_rows
from tests.training import Rows, distance, originals, plain, training, write

BOTH = pytest.mark.parametrize("kind", ["llama", "gpt2"])
FEW: dict[str, Any] = {"layers": (0,), "alpha": 12.0}
"""One block is enough where every component is ablated."""


@pytest.fixture(autouse=True)
def _other_numbers_in_every_session():
    torch.manual_seed(random.getrandbits(48))


def in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tiny models be in 16 bits from now on."""
    made = tiny.model
    monkeypatch.setattr(tiny, "model", lambda *args, **config: made(*args, **config).bfloat16())


def learned(run: Training) -> None:
    """Random B."""
    with torch.no_grad():
        for delta in run.adapter.deltas.values():
            delta.get_parameter("B").normal_(std=0.2)


def scores_at_will(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let importance be random, but that of the first layer so high that it loses nothing; and fast to find."""

    def drawn(run: Training, deltas: dict[str, Any]) -> dict[str, Tensor]:
        torch.manual_seed(run.step)
        found = {name: torch.rand(len(delta.A)) for name, delta in deltas.items()}
        return found | {name: found[name] + 9 for name in list(found)[:1]}

    monkeypatch.setattr(alora, "ablate", drawn)


def ranks(run: Training) -> list[int]:
    return [len(delta.get_parameter("A")) for delta in run.adapter.deltas.values()]


def tensors(run: Training) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in run.adapter.named_tensors().items()}


# ---- another rank for a layer -----------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal", "zero_a"])
def test_components_that_are_added_change_nothing_and_learn_from_the_next_step_on(kind, init):
    run = training({"init": init, "r": R, "alpha": 12.0, "lora_bias": kind == "gpt2"}, kind=kind)
    steps = train_steps(run)
    next(steps)
    before = logits_of(run, x := ids())
    counts = dict.fromkeys(run.adapter.deltas, 0)
    for number, (name, delta) in enumerate(run.adapter.deltas.items()):
        counts[name] = 1 + number % 3
        new = fresh(run.adapter, name, counts[name], generator_of(5, name))
        assert new["A"].any() or new["B"].any()
        A, B = torch.cat([delta.A, new["A"]]), torch.cat([delta.B, new["B"]], 1)
        put(run.adapter, name, {"A": A, "B": B}, run.optimizer)
    assert distance(logits_of(run, x), before) < 1e-6
    assert {spec.name: spec.r - R for spec in run.adapter.plan.layers} == counts
    assert run.adapter.plan.num_trainable == sum(p.numel() for p in run.adapter.trainable().values())
    run.model.train()
    next(steps)
    old = tensors(run)
    next(steps)
    for name, delta in run.adapter.deltas.items():
        assert delta.scale == 12.0 / R
        assert (delta.A[R:] != old[f"{name}.A"][R:]).any(1).all()
        assert (delta.B[:, R:] != old[f"{name}.B"][:, R:]).any(0).all()


def test_a_tensor_that_is_replaced_keeps_its_place_in_the_optimizer_and_loses_its_memories():
    run = training({"r": R})
    list(zip(range(2), train_steps(run), strict=False))
    name, delta = next(iter(run.adapter.deltas.items()))
    groups = [[id(p) for p in group["params"]] for group in run.optimizer.param_groups]
    old, others = delta.A, dict(run.optimizer.state)
    put(run.adapter, name, {"A": torch.ones(7, delta.A.shape[1])}, run.optimizer)
    now = [[id(p) for p in group["params"]] for group in run.optimizer.param_groups]
    assert [[id(delta.A) if each == id(old) else each for each in group] for group in groups] == now
    assert delta.A.requires_grad
    assert run.optimizer.state.keys() == others.keys() - {old}
    frozen = training({"r": R, "trainable": "lora_fa"})
    delta = frozen.adapter.deltas[name]
    before = frozen.adapter.plan.num_trainable
    put(frozen.adapter, name, {"A": torch.ones(7, delta.A.shape[1])}, frozen.optimizer)
    assert not delta.A.requires_grad
    assert frozen.adapter.plan.num_trainable == before


# ---- alora: importance ------------------------------------------------------------------------------------------


def loss_with(run: Training, components: dict[str, list[int]]) -> float:
    """On what is held out, in float64, of a plain model whose W has only these components of ΔW added."""
    model, W = copy.deepcopy(plain(run)).double(), originals(run)
    for name, chosen in components.items():
        delta = run.adapter.deltas[name]
        A, B = delta.A.detach().double(), delta.B.detach().double()
        for k in chosen:
            W[name] = W[name] + delta.scale * torch.outer(B[:, k], A[k])
    write(run, model, W)
    rows = run.split(run.held_out(run.step))[1].among.tolist()
    (batch,) = micro_batches(run.examples, rows, max_tokens=None, max_rows=None, packing=False, pad_id=0)
    with torch.no_grad():
        total = loss_sum(model, batch, torch.device("cpu"))
    return (total / run.examples.trained_counts[rows].sum()).item()


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_importance_is_the_loss_without_a_component_less_the_loss_with_no_other(kind, dtype, monkeypatch):
    """Against dense weights in float64; the model is afterwards what it was, to the bit."""
    if dtype == "bfloat16":
        in_bfloat16(monkeypatch)
    run = begun(
        "alora", {"rows": 5}, kind=kind, adapter=FEW | {"dropout": 0.5}, train={"micro_batch_size": 2}
    )
    run.precision = getattr(torch, dtype)
    learned(run)
    before = tensors(run)
    found = alora.ablate(run, run.lifecycles[0].deltas)
    assert all(torch.equal(now, before[name]) for name, now in tensors(run).items())
    whole = {name: list(range(R)) for name in found}
    chosen = random.sample([(name, k) for name in found for k in range(R)], 6)
    expected, seen = [], []
    for name, k in chosen:
        without = whole | {name: [each for each in range(R) if each != k]}
        expected.append(loss_with(run, without) - loss_with(run, {name: [k]}))
        seen.append(found[name][k].item())
    assert len(set(seen)) > 1
    near = 2e-5 if dtype == "float32" else 3e-2
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(expected), rtol=0, atol=near)


@BOTH
def test_a_component_that_does_harm_goes_first(kind):
    run = begun("alora", {"rows": 8, "begin": 0.05, "rounds": 1}, kind=kind, adapter=FEW)
    name, delta = random.choice(list(run.adapter.deltas.items()))
    k, kept = random.randrange(R), run.split(8)[1].among.tolist()
    uphill = of_rows(run, kept)[f"{name}.B"][:, k]
    with torch.no_grad():
        delta.B[:, k] = 0.5 * uphill / uphill.norm()
    harmful, scores = delta.A[k].detach().clone(), alora.ablate(run, run.lifecycles[0].deltas)
    assert min(score.min() for score in scores.values()) == scores[name][k]
    run.step = 1
    run.lifecycles[0].stepped(run)
    assert not (harmful == run.adapter.deltas[name].A).all(1).any()


# ---- alora: what goes and what comes ----------------------------------------------------------------------------

SCORES = st.lists(
    st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=6).map(torch.tensor), min_size=1, max_size=6
)


@settings(deadline=None)
@given(SCORES)
def test_the_number_of_components_never_grows_and_stays_where_a_layer_lost_none(listed):
    scores = {str(number): each for number, each in enumerate(listed)}
    kept = alora.staying(scores)
    added = alora.shared_out(scores, kept)
    total = sum(len(each) for each in listed)
    gone = [scores[name][~each] for name, each in kept.items()]
    count = sum(len(each) for each in gone)
    assert count == min(len(listed), total - len(listed)), (
        "as many as there are layers, but one is left of each"
    )
    assert all(each.any() and scores[name][each].max() == scores[name].max() for name, each in kept.items())
    spare = [
        value for name, each in kept.items() for value in sorted(scores[name][each].tolist())[:-1]
    ]  # might have gone, too
    assert not spare or not count or max(float(each.max()) for each in gone if len(each)) <= min(spare)
    untouched = [name for name, each in kept.items() if each.all()]
    assert {name for name, number in added.items() if number} <= set(untouched)
    assert sum(added.values()) == (count if untouched else 0)


def test_new_components_are_shared_out_evenly_and_the_rest_goes_to_the_best_mean():
    scores = {
        name: torch.tensor(each)
        for name, each in zip("abcd", ([9.0, 1.0], [-5.0] * 5 + [7.0], [8.0, 8.0], [2.0]), strict=True)
    }
    kept = {name: torch.ones(len(each), dtype=torch.bool) for name, each in scores.items()}
    kept["b"][:5] = False
    assert alora.shared_out(scores, kept) == {"a": 2, "b": 0, "c": 2, "d": 1}
    kept["a"][1] = kept["c"][0] = kept["d"][0] = False
    assert alora.shared_out(scores, kept) == dict.fromkeys("abcd", 0)


@BOTH
def test_a_round_takes_out_what_counts_least_and_what_it_adds_changes_nothing(kind, monkeypatch):
    """The model after a round is that before it without some components."""
    scores_at_will(monkeypatch)
    run = begun("alora", {"rows": 6, "begin": 0.05, "rounds": 1}, kind=kind, adapter=FEW)
    learned(run)
    mover, x = run.lifecycles[0], ids()
    run.step = 1
    kept = alora.staying(alora.ablate(run, mover.deltas))
    after, before = copy.deepcopy(tensors(run)), ranks(run)
    with torch.no_grad():
        for name, delta in run.adapter.deltas.items():
            delta.B.mul_(kept[name])
    thinner = logits_of(run, x)
    with torch.no_grad():
        for name, delta in run.adapter.deltas.items():
            delta.B.copy_(after[f"{name}.B"])
    mover.stepped(run)
    assert ranks(run)[0] > R
    assert distance(logits_of(run, x), thinner) < 1e-6
    assert sum(ranks(run)) == sum(before)


def course(run: Training) -> list[list[int]]:
    return [ranks(run) for _ in train_steps(run)]


def test_rounds_come_evenly_after_the_begin_and_never_on_rows_that_are_learned():
    rows = Rows()
    run = begun("alora", {"rows": 5, "begin": 0.5, "rounds": 5}, adapter=FEW, rows=rows)
    seen: list[int] = []
    run.lifecycles[0]._move = lambda run: seen.append(run.step)
    kept = set(run.split(5)[1].among)
    assert not {row for step in range(20) for row in run.rows(step)} & kept
    list(train_steps(run))
    assert seen == [10, 12, 14, 16, 18]
    few = begun("alora", {"rows": 500}, adapter=FEW)
    assert len(few.rows(0)) == 4
    assert few.held_out(3) == 12, "half of the rows at most"


def test_ranks_move_while_their_sum_stays_and_micro_batches_change_nothing():
    settings = {"rows": 3, "begin": 0.2, "rounds": 2}
    run = begun("alora", settings, adapter=FEW)
    seen = course(run)
    assert len({str(each) for each in seen}) == 3
    assert [sum(each) for each in seen] == sorted((sum(each) for each in seen), reverse=True)
    assert min(min(each) for each in seen) >= 1
    same_courses("alora", ranks, {"rows": 2, "begin": 0.5, "rounds": 1})


@BOTH
@pytest.mark.parametrize("combine", ["add", "dora"])
def test_alora_is_saved_as_lora_with_a_rank_for_every_layer_which_peft_computes_alike(
    tmp_path, kind, combine, monkeypatch
):
    scores_at_will(monkeypatch)
    peft = pytest.importorskip("peft")
    adapter = FEW | {"combine": combine, "scale": "rslora"}
    run = begun("alora", {"rows": 4, "rounds": 2}, kind=kind, adapter=adapter, train={"max_steps": 8})
    list(train_steps(run))
    trained, again, loaded = put_back(run, tmp_path, kind)
    assert distance(again, trained) < 1e-6
    assert {name: len(delta.A) for name, delta in loaded.deltas.items()} == dict(
        zip(run.adapter.deltas, ranks(run), strict=True)
    )
    assert len(set(ranks(run))) > 1
    assert json.loads((tmp_path / files.CONFIG).read_text())["peft_type"] == "LORA"
    x = ids()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft about itself
        theirs = peft.PeftModel.from_pretrained(tiny.model(kind), tmp_path).eval()
    assert distance(theirs(x).logits, logits_of(run, x)) < 1e-5


# ---- back to an earlier checkpoint ------------------------------------------------------------------------------


def test_a_run_goes_back_to_what_it_was_before_ranks_changed(tmp_path, monkeypatch):
    """As early stopping does, which saves the best adapter there was."""
    scores_at_will(monkeypatch)
    goes_back(
        begun("alora", {"rows": 4, "begin": 0.4, "rounds": 2}, adapter=FEW, train={"max_steps": 8}), tmp_path
    )


def goes_back(run: Training, tmp_path: Path) -> None:
    """Train to the end, then restore checkpoints in any order."""
    kept: dict[int, tuple[Path, dict[str, Tensor], Tensor]] = {}
    x = ids()
    for report in train_steps(run):
        kept[report.step] = checkpoint.save(tmp_path, run, {}), tensors(run), logits_of(run, x)
        run.model.train()
    assert len({str([tuple(t.shape) for t in each[1].values()]) for each in kept.values()}) > 1
    for step in (2, 7, 1, 8):
        folder, before, logits = kept[step]
        checkpoint.restore(folder, run)
        now = tensors(run)
        assert now.keys() == before.keys()
        assert all(torch.equal(now[name], before[name]) for name in now)
        assert torch.equal(logits_of(run, x), logits)
