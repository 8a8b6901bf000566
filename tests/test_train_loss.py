"""The loss on trained tokens only is the model's own loss, whatever the architecture does around its head."""

import pytest
import torch
from torch.nn import functional as F

from lora_cli.adapter import inject, plan
from lora_cli.data.example import IGNORE, Batch
from lora_cli.model import ends_of
from lora_cli.recipe.schema import AdapterRecipe
from lora_cli.train import head
from lora_cli.train.loss import Loss, loss_sum, trained_logits
from tests import tiny
from tests.training import distance, fresh

KINDS = ("llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "phi3", "granite", "cohere", "mixtral")
CPU = torch.device("cpu")


def batch_of(rows: int = 3, length: int = 11, seed: int = 0) -> Batch:
    """Random ids, about half of them trained, the last row padded."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, tiny.VOCABULARY, (rows, length), generator=draw)
    trained = torch.rand(rows, length, generator=draw) < 0.5
    mask = torch.ones_like(ids)
    mask[-1, length // 2 :] = 0
    labels = torch.where(trained & (mask == 1), ids, IGNORE)
    labels[:, 0] = IGNORE
    return Batch(ids, labels, torch.arange(length).expand(rows, -1), mask, tuple(range(rows)))


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_models_own(kind):
    model, batch = tiny.model(kind).requires_grad_(False), batch_of()
    output = model(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
    count = (batch.labels != IGNORE).sum()
    for found in (loss_sum(model, batch, CPU), Loss.of(model)(batch, CPU)):
        torch.testing.assert_close(found / count, output.loss, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_exist_only_where_a_token_is_trained(kind):
    model, batch = tiny.model(kind), batch_of()
    logits, targets = trained_logits(model, batch, CPU)
    everywhere = model(batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    trained = batch.labels[:, 1:] != IGNORE
    assert logits.shape == (trained.sum(), tiny.VOCABULARY)
    torch.testing.assert_close(logits, everywhere[trained], rtol=1e-5, atol=1e-5)
    assert torch.equal(targets, batch.labels[:, 1:][trained])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_full_computation(kind):
    grads = []
    for own in (True, False):
        model = tiny.model(kind)
        adapter = inject.inject(model, plan.make(AdapterRecipe(r=4), model, ends_of(model)))
        batch = batch_of()
        if own:
            loss = Loss.of(model)(batch, CPU)
        else:
            logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum")
        loss.backward()
        grads.append({name: p.grad for name, p in adapter.trainable().items()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-6)


def test_the_head_is_left_as_it_was_even_after_an_error():
    model = tiny.model()
    bad = batch_of()
    bad.input_ids[0, 0] = 10_000
    with pytest.raises(IndexError):
        loss_sum(model, bad, CPU)
    assert not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "gemma" not in kind])
def test_logits_that_are_only_scaled_are_never_asked_of_the_model(kind, monkeypatch):
    monkeypatch.setattr("lora_cli.train.loss.loss_sum", None)
    Loss.of(tiny.model(kind).requires_grad_(False))(batch_of(), CPU)


def test_logits_that_are_capped_are_the_models():
    model = tiny.model("gemma2", final_logit_softcapping=30.0).requires_grad_(False)
    assert Loss.of(model).scale is None


def test_a_head_that_trains_or_is_adapted_computes_its_own_logits():
    model = tiny.model().requires_grad_(False)
    assert Loss.of(model).scale == 1
    model.lm_head.requires_grad_(True)
    assert Loss.of(model).scale is None
    model = tiny.model()
    settings = AdapterRecipe(r=4, target_modules=("lm_head",))
    inject.inject(model, plan.make(settings, model, ends_of(model)))
    assert Loss.of(model).scale is None


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_cross_entropy_and_its_gradient_are_the_definition_however_it_is_cut(rows, bias, monkeypatch):
    vocabulary, generator = 37, fresh()
    monkeypatch.setitem(head.LOGITS_BYTES, "cpu", 4 * vocabulary * rows)
    hidden, W = (torch.randn(n, 8, generator=generator, dtype=torch.float64) * 3 for n in (10, vocabulary))
    b = torch.randn(vocabulary, generator=generator, dtype=torch.float64) if bias else None
    targets = torch.randint(vocabulary, (10,), generator=generator)
    hidden.requires_grad_()
    expected = F.cross_entropy(1.7 * F.linear(hidden, W, b), targets, reduction="sum")
    (right,) = torch.autograd.grad(5 * expected, hidden)
    found = head.cross_entropy(hidden, W, b, targets, 1.7)
    (gradient,) = torch.autograd.grad(5 * found, hidden)
    assert distance(found, expected) <= 1e-6
    assert distance(gradient, right) <= 1e-6


def test_cross_entropy_of_a_token_that_is_all_but_impossible_is_finite():
    hidden = torch.tensor([[400.0]], requires_grad=True)
    W = torch.tensor([[1.0], [-1.0]])
    loss = head.cross_entropy(hidden, W, None, torch.tensor([1]), 1.0)
    loss.backward()
    assert loss.item() == 800
    assert hidden.grad is not None
    assert hidden.grad.item() == 2


def test_cross_entropy_of_nothing_is_zero():
    hidden = torch.zeros(0, 8, requires_grad=True)
    loss = head.cross_entropy(hidden, torch.randn(37, 8), None, torch.zeros(0, dtype=torch.int64), 1.0)
    loss.backward()
    assert loss.item() == 0
