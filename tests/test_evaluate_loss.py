"""The held-out loss: what it is, and that measuring it leaves no trace."""

import random

import numpy as np
import pytest
import torch

from lora_cli.data.example import Example
from lora_cli.evaluate import loss
from lora_cli.evaluate.loss import HeldOutLoss, held_out_loss
from tests import tiny


class InMemory(list[Example]):
    """Examples as the cache gives them."""

    @property
    def trained_counts(self) -> np.ndarray:
        return np.array([sum(example.trained) for example in self])


def drawn(seed: int, count: int = 11) -> InMemory:
    draw = random.Random(seed)
    found = InMemory()
    for row in range(count):
        ids = tuple(draw.randrange(5, tiny.VOCABULARY) for _ in range(draw.randint(2, 30)))
        trained = (False, *(draw.random() < 0.4 for _ in ids[2:]), True)
        found.append(Example(ids, trained, f"rows:{row}"))
    return found


def measured(model, examples, **settings) -> HeldOutLoss:
    settings = {"max_tokens": 64, "pad_id": 0, **settings}
    return held_out_loss(model, examples, device=torch.device("cpu"), **settings)


def nats(model, example: Example) -> float:
    """−log p of the trained tokens of one example, alone and in float64."""
    with torch.no_grad():
        log_p = model(torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
    ids = enumerate(example.input_ids)
    return -sum(log_p[at - 1, token].item() for at, token in ids if example.trained[at])


@pytest.mark.parametrize("max_tokens", [1, 64, 10_000])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere"])
def test_each_example_has_its_own_loss_in_order_however_it_is_batched(kind, max_tokens, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 4)
    examples = drawn(max_tokens)
    found = measured(tiny.model(kind), examples, max_tokens=max_tokens)
    exact = tiny.model(kind).double()
    expected = [nats(exact, example) for example in examples]
    assert found.sums == pytest.approx(expected, abs=2e-4)
    assert found.trained_tokens == sum(sum(example.trained) for example in examples)
    assert found.loss == pytest.approx(sum(expected) / found.trained_tokens, abs=1e-5)
    assert found.perplexity == pytest.approx(np.exp(sum(expected) / found.trained_tokens), rel=1e-4)


def test_rows_limits_it_to_the_first():
    model, examples = tiny.model(), drawn(2)
    assert measured(model, examples, rows=3).sums == pytest.approx(
        measured(model, examples).sums[:3], abs=1e-5
    )
    assert len(measured(model, examples, rows=100).sums) == len(examples)


def test_modes_gradients_and_random_numbers_are_left_alone():
    model = tiny.model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5).train()
    model.transformer.h[0].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    assert measured(model, drawn(3)) == measured(model, drawn(3))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()


def test_modes_are_put_back_after_an_error():
    model = tiny.model().train()
    with pytest.raises(IndexError):
        measured(model, InMemory([Example((5, 10_000), (False, True), "rows:1")]))
    assert all(module.training for module in model.modules())
