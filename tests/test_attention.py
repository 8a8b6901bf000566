"""Cutting a packed row at the borders of its documents changes no result, and only plain masks are cut."""

import random

import pytest
import torch

from lora_cli import attention
from lora_cli.data.example import Example
from lora_cli.data.pack import micro_batches
from tests import tiny
from tests.training import fresh

KINDS = ("llama", "qwen3", "gemma3_text", "gpt2", "phi3", "granite", "cohere", "mixtral")


def block_mask(lengths):
    return torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool()[None, None]


def lengths_of(generator, count=5):
    return [int(torch.randint(1, 9, (), generator=generator)) for _ in range(count)]


def test_documents_are_read_from_their_mask():
    lengths = lengths_of(fresh())
    assert attention.documents(block_mask(lengths)) == lengths


def test_any_other_mask_is_left_to_attention():
    lengths = [3, *lengths_of(fresh()), 4]
    mask = block_mask(lengths)
    tokens = sum(lengths)
    for i, j in ((2, 0), (tokens - 1, tokens - 3), (tokens - 1, 0), (0, tokens - 1)):
        other = mask.clone()
        other[..., i, j] = ~other[..., i, j]
        assert attention.documents(other) is None
    assert attention.documents(mask.expand(2, -1, -1, -1)) is None
    assert attention.documents(mask[..., :-1]) is None
    assert attention.documents(mask.float()) is None


def packed():
    generator = fresh()
    lengths = [40, *lengths_of(generator)]
    ids = [torch.randint(5, tiny.VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    rows = [Example(tuple(row), (True,) * len(row), "") for row in ids]
    settings = {"max_tokens": None, "max_rows": None, "pad_id": 0}
    return micro_batches(rows, range(len(rows)), packing=True, **settings)[0]


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_of_packed_documents_are_those_of_the_masked_row(kind, window, monkeypatch):
    batch, found = packed(), []
    number = random.getrandbits(16)
    for used in (False, True):
        config = {"sliding_window": window} if window and kind in ("gemma3_text", "mixtral", "phi3") else {}
        model = tiny.model(kind, number, **config).eval()
        cut = []
        if used:
            attention.use(model)
            right = attention.documents
            monkeypatch.setattr(
                attention, "documents", lambda mask, right=right, cut=cut: cut.append(right(mask)) or cut[-1]
            )
        logits = model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        logits.square().sum().backward()
        found.append((logits, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert len(cut) == 2
    assert any(cut) or config
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-5)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max())
