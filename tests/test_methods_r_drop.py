"""Two passes that should predict the same: what is added to the loss, through which pass, and how it is split."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_cli.adapter import rules
from lora_cli.data.example import IGNORE
from lora_cli.presets import resolve
from lora_cli.recipe.schema import AdapterRecipe
from lora_cli.train import head, twice
from lora_cli.train.gradient import accumulate
from lora_cli.train.loop import Training, train_steps
from tests.training import Rows, batch_of, distance, fresh, training

KINDS = ("llama", "gpt2", "granite", "gemma2")
"""Of them the third multiplies its logits, and the fourth bends them."""


def logits(*shape: int) -> Tensor:
    return 3 * torch.randn(*shape, generator=fresh(), dtype=torch.float64)


def by_torch(a: Tensor, b: Tensor) -> Tensor:
    """½·(KL(p‖q) + KL(q‖p)) by PyTorch's own KL divergence; b is a constant."""
    log_p, log_q = a.log_softmax(-1), b.detach().log_softmax(-1)
    kl = [F.kl_div(y, x, log_target=True, reduction="sum") for x, y in ((log_p, log_q), (log_q, log_p))]
    return 0.5 * (kl[0] + kl[1])


class Alternating(nn.Module):
    """Scales the inputs of ΔW, feature by feature, in one way in every first pass, in another in every second."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.ways = 1 + 0.5 * torch.randn(2, features, generator=fresh())
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        way = self.ways[self.calls % 2].to(x.dtype)
        self.calls += 1
        return x * way


def run_of(weight: float | None, kind: str = "llama", drop: bool = True, **train: Any) -> Training:
    """About to take its first step, every tensor random; without the part where there is no weight."""
    lifecycle = {} if weight is None else {"lifecycle": {"r_drop": {"weight": weight}}}
    run = training({"dropout": 0.1, **lifecycle}, {"batch_size": 8, **train}, kind=kind, rows=ROWS)
    generator = torch.Generator().manual_seed(1)
    for name, delta in run.adapter.deltas.items():
        for parameter in delta.parameters():
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        delta.dropout = ALTERNATING.setdefault((kind, name), Alternating(delta.A.shape[1])) if drop else None
        if drop:
            delta.dropout.calls = 0
    return run


ROWS = Rows(8)
ALTERNATING: dict[tuple[str, str], Alternating] = {}


def gradient(run: Training) -> Tensor:
    run.optimizer.zero_grad(set_to_none=True)
    rows = run.rows(run.step)
    accumulate(run, rows, int(run.examples.trained_counts[rows].sum()))
    return torch.cat([p.grad.flatten() for p in run.adapter.trainable().values()])


def test_the_divergence_is_that_of_pytorch_both_ways_and_zero_for_equal_passes():
    a, b = logits(7, 11).requires_grad_(), logits(7, 11)
    expected = by_torch(a, b)
    found = twice.divergence(a, b)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(each, a)[0] for each in (found, expected)))
    assert twice.divergence(a, a) == 0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_a_few_positions_at_a_time_give_the_same_as_all_logits_at_once(monkeypatch, bias, count):
    monkeypatch.setitem(head.LOGITS_BYTES, "cpu", 4 * 13 * 3)
    W, b = logits(13, 5), logits(13) if bias else None
    first, second = logits(count, 5).requires_grad_(), logits(count, 5)
    expected = twice.divergence(0.25 * F.linear(first, W, b), 0.25 * F.linear(second, W, b))
    found = twice._apply(first, second, W, b, 0.25, head.parts)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(3 * each, first)[0] for each in (found, expected)))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_added_is_the_mean_divergence_at_the_trained_tokens_through_the_first_pass(kind):
    """Against whole logits of the model, all positions, without any of the loss' own ways."""
    plain = run_of(None, kind)
    batch = batch_of(plain, 0)
    found: list[Tensor] = []
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found.append(
                plain.model(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    position_ids=batch.position_ids,
                    use_cache=False,
                ).logits
            )
    at = batch.labels[:, 1:] != IGNORE
    expected = 5.0 * by_torch(*(each[:, :-1][at] for each in found)) / at.sum()
    gradients = torch.autograd.grad(expected, list(plain.adapter.trainable().values()))
    with_it, without = gradient(run_of(5.0, kind)), gradient(run_of(None, kind, drop=True))
    assert distance(with_it - without, torch.cat([g.flatten() for g in gradients])) < 1e-4


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_a_step_is_the_same_however_it_is_split(kind):
    whole = gradient(run_of(5.0, kind, micro_batch_size=8))
    for rows in (3, 1):
        assert distance(gradient(run_of(5.0, kind, micro_batch_size=rows)), whole) < 1e-5
    assert distance(gradient(run_of(1e-6, kind, micro_batch_size=8)), whole) > 1e-3


def test_passes_that_do_not_differ_add_nothing_at_all():
    assert torch.equal(gradient(run_of(5.0, drop=False)), gradient(run_of(None, drop=False)))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_activations_that_are_computed_again_are_those_of_the_first_pass(checkpointed):
    found = []
    for asked in (False, checkpointed):
        run = training(
            {"method": "hiddenkey", "dropout": 0.2},
            {"gradient_checkpointing": asked, "max_steps": 3},
            rows=ROWS,
        )
        list(train_steps(run))
        found.append(torch.cat([p.detach().flatten() for p in run.adapter.trainable().values()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_sixteen_bits_compute_it_like_thirty_two():
    narrow, wide = run_of(5.0), run_of(5.0)
    narrow.precision = torch.bfloat16
    assert distance(gradient(narrow), gradient(wide)) < 0.1


def test_it_brings_the_two_passes_together_and_has_no_share_in_the_reported_loss():
    apart, first = [], []
    for weight in (1e-6, 100.0):
        run = training(
            {"dropout": 0.3, "lifecycle": {"r_drop": {"weight": weight}}},
            {"max_steps": 30, "learning_rate": 3e-3, "batch_size": 8},
            rows=ROWS,
        )
        first.append(next(train_steps(run)).loss)
        list(train_steps(run))
        batch = batch_of(run, 0)
        with torch.no_grad():
            for _ in range(16):
                run.model(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    position_ids=batch.position_ids,
                    use_cache=False,
                )
                apart.append(run.lifecycles[-1].divergence(batch))
    assert sum(apart[16:]) < 0.6 * sum(apart[:16])
    assert first[1] == pytest.approx(first[0], rel=1e-6)


def test_nothing_is_kept_between_steps_or_outside_of_training():
    run = run_of(1.0)
    watching = run.lifecycles[-1].divergence.__closure__
    assert watching is not None
    kept = next(cell.cell_contents for cell in watching if isinstance(cell.cell_contents, twice.Twice))
    gradient(run)
    run.model.eval()
    run.model(input_ids=batch_of(run, 0).input_ids)
    assert kept.read is None
    assert kept.logits is None


@pytest.mark.parametrize(
    ("attention", "dropout", "drops"),
    [
        ("full", 0.0, False),
        ("full", 0.1, True),
        ("shifted", 0.0, False),
        ({"key_drop": {"key": 0.0, "hidden": 0.0}}, 0.0, False),
        ({"key_drop": {"key": 0.1, "hidden": 0.0}}, 0.0, True),
        ({"key_drop": {"key": 0.0, "hidden": 0.1}}, 0.0, True),
    ],
)
def test_it_is_known_beforehand_whether_anything_is_dropped(attention, dropout, drops):
    method = resolve(AdapterRecipe.model_validate({"attention": attention, "dropout": dropout}))
    assert (rules.DROPS in rules.facts_of(method)) == drops
