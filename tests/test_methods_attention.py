"""Attention that a method changes while training: who sees whom, and that evaluation knows nothing of it."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_cli import attention
from lora_cli.errors import UserError
from lora_cli.methods.attention import key_drop, shifted
from lora_cli.parts import Part
from tests import tiny
from tests.test_attention import block_mask, packed
from tests.training import NO_DROPOUT, fresh

HEADS, WIDTH = 4, 8
KINDS = ("llama", "qwen3", "gpt2", "phi3")


def qkv(tokens: int, rows: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = fresh()
    q, k, v = (torch.randn(rows, HEADS, tokens, WIDTH, generator=generator) for _ in range(3))
    return q, k, v


def in_groups(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, groups: int) -> Tensor:
    return shifted.make(nn.Identity(), groups)(nn.Identity(), q, k, v, mask, {})


def by_hand(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], groups: int) -> Tensor:
    """The definition, a token at a time, in float64: [1, tokens, heads, width]."""
    q, k, v = q.double(), k.double(), v.double()
    out, start = torch.zeros_like(q), 0
    for length in lengths:
        size = -(-length // groups)
        for head in range(HEADS):
            shift = size // 2 if head >= HEADS // 2 and groups > 1 else 0
            group = [(p - shift) // size if shift else p // size for p in range(length)]
            for p in range(length):
                seen = [start + s for s in range(p + 1) if group[s] == group[p]]
                scores = k[0, head, seen] @ q[0, head, start + p] / WIDTH**0.5
                out[0, head, start + p] = scores.softmax(0) @ v[0, head, seen]
        start += length
    return out.transpose(1, 2)


# ---- LongLoRA -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 4, 9])
def test_attention_in_shifted_groups_is_its_definition(groups):
    lengths = [13, 1, 8, 6]
    q, k, v = qkv(sum(lengths))
    expected = by_hand(q, k, v, lengths, groups)
    torch.testing.assert_close(
        in_groups(q, k, v, block_mask(lengths), groups).double(), expected, rtol=0, atol=1e-5
    )
    alone = in_groups(*(t[:, :, :13] for t in (q, k, v)), None, groups)
    torch.testing.assert_close(alone.double(), expected[:, :13], rtol=0, atol=1e-5)


def test_one_group_is_full_attention():
    q, k, v = qkv(11)
    full = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(in_groups(q, k, v, None, 1), full, rtol=0, atol=1e-5)


def test_no_token_sees_what_lies_behind_it_and_each_reads_its_own_query():
    """The leak of rolling tokens round, and of not rolling them back."""
    q, k, v = (t.requires_grad_() for t in qkv(16))
    out = in_groups(q, k, v, None, 4)
    for p in range(16):
        gradients = torch.autograd.grad(out[0, p].square().sum(), (q, k, v), retain_graph=True)
        for gradient in gradients[1:]:
            assert torch.count_nonzero(gradient[0, :, p + 1 :]) == 0
        of_query = gradients[0][0].abs().sum((0, 2))
        assert set(of_query.nonzero().flatten().tolist()) <= {p}


def test_half_of_the_heads_carry_a_token_over_the_border_of_a_group():
    q, k, v = (t.requires_grad_() for t in qkv(16))
    out = in_groups(q, k, v, None, 4)
    (seen,) = torch.autograd.grad(out[0, 4].sum(), v)
    crossing = seen[0, :, 3].abs().sum(-1) > 0
    assert crossing.tolist() == [False, False, True, True]


def test_padded_documents_are_grouped_as_they_are_alone():
    lengths, widest = [9, 5, 12], 12
    q, k, v = qkv(widest, rows=3)
    real = torch.arange(widest) < torch.tensor(lengths)[:, None]
    mask = (torch.ones(widest, widest).tril().bool() & real[:, None, :])[:, None]
    found = in_groups(q, k, v, mask, 4)
    assert torch.isfinite(found).all()
    for row, length in enumerate(lengths):
        alone = in_groups(*(t[row : row + 1, :, :length] for t in (q, k, v)), None, 4)
        torch.testing.assert_close(found[row : row + 1, :length], alone, rtol=0, atol=1e-5)


# ---- HiddenKey ------------------------------------------------------------------------------------------------------


def test_a_hidden_key_has_no_weight_for_any_query_of_its_head_and_the_others_add_up_to_one():
    tokens = 9
    visible = torch.ones(tokens, tokens).tril().bool()
    hidden = torch.zeros(2, HEADS, 1, tokens, dtype=torch.bool)
    hidden[0, 1, 0, [2, 5]] = True
    seen = key_drop.hide(visible, hidden)
    weights = torch.randn(2, HEADS, tokens, tokens).masked_fill(~seen, -torch.inf).softmax(-1)
    assert torch.count_nonzero(weights[0, 1, :, [2, 5]]) == 0
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, HEADS, tokens))
    others = torch.ones(2, HEADS, dtype=torch.bool)
    others[0, 1] = False
    assert torch.equal(seen[others], visible.expand(2, HEADS, -1, -1)[others])


def test_a_token_that_would_see_nothing_sees_everything():
    visible = torch.ones(5, 5).tril().bool()
    hidden = torch.tensor([True, True, False, False, False]).view(1, 1, 1, 5)
    seen = key_drop.hide(visible, hidden)[0, 0]
    assert torch.equal(seen[:2], visible[:2])
    assert seen[2].tolist() == [False, False, True, False, False]


def test_keys_are_hidden_as_often_as_asked_and_queries_agree():
    """With equal scores and one-hot values the output of a query is 1 / seen at every key that it sees."""
    tokens, p = 40, 0.3
    q = torch.zeros(50, HEADS, tokens, tokens)
    out = key_drop.attend(p, nn.Identity(), q, q, torch.eye(tokens).expand(50, HEADS, -1, -1), None, {})
    last, before = (out.transpose(1, 2)[:, :, at] > 0 for at in (-1, -2))
    assert last.float().mean().item() == pytest.approx(1 - p, abs=0.02)
    assert torch.equal(last[..., :-1], before[..., :-1]), "the same keys for all queries"
    assert not torch.equal(last[:, 0], last[:, 1]), "other keys for each head"


def test_nothing_is_hidden_at_zero():
    assert key_drop.make(nn.Identity(), 0.0, 0.0) is None


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_inside_every_mlp_is_dropped_while_training(kind):
    model = tiny.model(kind, **(NO_DROPOUT if kind == "gpt2" else {}))
    found = list(key_drop.narrowing(model))
    assert len(found) == model.config.num_hidden_layers
    key_drop.make(model, 0.0, 0.5)
    seen: list[Tensor] = []
    found[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    ids = torch.randint(5, tiny.VOCABULARY, (4, 50))
    model.train()(ids)
    model.eval()(ids)
    assert (seen[0] == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    kept = seen[0] != 0
    torch.testing.assert_close(seen[0][kept], 2 * seen[1][kept], rtol=1e-4, atol=1e-6)


# ---- in a model -----------------------------------------------------------------------------------------------------

CHANGED: dict[str, dict[str, Any]] = {"shifted": {"groups": 4}, "key_drop": {"key": 0.4, "hidden": 0.0}}


@pytest.mark.parametrize("cuts", [False, True])
@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.parametrize("kind", KINDS)
def test_attention_changes_while_training_and_is_the_models_own_in_evaluation(kind, name, cuts):
    batch = packed()
    model = tiny.model(kind, **(NO_DROPOUT if kind == "gpt2" else {}))
    if cuts:
        attention.use(model)

    def logits() -> Tensor:
        with torch.no_grad():
            return model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits

    plain = logits()
    attention.train_with(model, Part(name, CHANGED[name]))
    assert torch.equal(model.eval() and logits(), plain)
    model.train()
    assert not torch.allclose(logits(), plain, atol=1e-4)
    neutral = {"shifted": {"groups": 1}, "key_drop": {"key": 1e-12, "hidden": 0.0}}[name]
    again = tiny.model(kind, **(NO_DROPOUT if kind == "gpt2" else {})).train()
    attention.train_with(again, Part(name, neutral))
    with torch.no_grad():
        found = again(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_document_is_trained_the_same_packed_padded_or_alone(kind):
    """Shifted groups are of documents, not of rows."""
    model = tiny.model(kind, **(NO_DROPOUT if kind == "gpt2" else {}))
    attention.use(model)
    attention.train_with(model, Part("shifted", {"groups": 3}))
    model.train()
    batch = packed()
    starts = [*(batch.position_ids[0] == 0).nonzero().flatten().tolist(), batch.input_ids.shape[1]]
    documents = [batch.input_ids[:, a:b] for a, b in pairwise(starts)]
    together = model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    widest = max(ids.shape[1] for ids in documents)
    ids = torch.cat([F.pad(ids, (0, widest - ids.shape[1])) for ids in documents])
    mask = torch.cat([F.pad(torch.ones_like(ids), (0, widest - ids.shape[1])) for ids in documents])
    padded = model(ids, attention_mask=mask, use_cache=False).logits
    for number, document in enumerate(documents):
        alone = model(document, use_cache=False).logits[0]
        length = document.shape[1]
        torch.testing.assert_close(
            together[0, starts[number] : starts[number] + length], alone, rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(padded[number, :length], alone, rtol=1e-4, atol=1e-5)


def test_attention_that_is_not_sdpa_is_refused():
    model = tiny.model("llama")
    model.set_attn_implementation("eager")
    with pytest.raises(UserError, match="attends by eager"):
        attention.train_with(model, Part("shifted"))
