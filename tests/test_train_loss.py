"""The loss on trained tokens only is the model's own loss, whatever the architecture does around its head."""

import pytest
import torch
from torch.nn import functional as F

from lora_cli.adapter import inject, plan
from lora_cli.data.example import IGNORE, Batch
from lora_cli.model import ends_of
from lora_cli.recipe.schema import AdapterRecipe
from lora_cli.train.loss import loss_sum, trained_logits
from tests import tiny

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
    model, batch = tiny.model(kind), batch_of()
    output = model(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
    count = (batch.labels != IGNORE).sum()
    torch.testing.assert_close(loss_sum(model, batch, CPU) / count, output.loss, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_exist_only_where_a_token_is_trained(kind):
    model, batch = tiny.model(kind), batch_of()
    logits, targets = trained_logits(model, batch, CPU)
    everywhere = model(batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    trained = batch.labels[:, 1:] != IGNORE
    assert logits.shape == (trained.sum(), tiny.VOCABULARY)
    torch.testing.assert_close(logits, everywhere[trained], rtol=1e-5, atol=1e-5)
    assert torch.equal(targets, batch.labels[:, 1:][trained])


def test_gradients_are_those_of_the_full_computation():
    grads = []
    for own in (True, False):
        model = tiny.model("gemma2")
        adapter = inject.inject(model, plan.make(AdapterRecipe(r=4), model, ends_of(model)))
        batch = batch_of()
        if own:
            loss = loss_sum(model, batch, CPU)
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
