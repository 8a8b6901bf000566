"""Every example once, no label over a boundary, and no document that sees another one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.data.cache import Examples
from lora_cli.data.example import IGNORE, Example
from lora_cli.data.pack import check_isolation, epoch_length, epoch_order, micro_batches
from lora_cli.errors import ExitCode, UserError
from tests import tiny

PAD = 4  # the end token: padding must not hide it

token = st.integers(0, tiny.VOCABULARY - 1) | st.just(PAD)
marked = st.lists(st.tuples(token, st.booleans()), min_size=1, max_size=30)
documents = st.lists(marked, min_size=1, max_size=12)
limit = st.none() | st.integers(1, 64)
fresh = settings(max_examples=80, deadline=None)


def example(pairs):
    return Example(tuple(t for t, _ in pairs), tuple(m for _, m in pairs), "f:1")


def expected(found):
    """Tokens and labels of one document, by the definition."""
    labels = [
        t if m and i else IGNORE for i, (t, m) in enumerate(zip(found.input_ids, found.trained, strict=True))
    ]
    return list(found.input_ids), labels


def taken_apart(batch):
    """The documents of a batch, told apart by its mask, or by its positions alone."""
    if batch.attention_mask is not None:
        rows = zip(batch.input_ids, batch.labels, batch.attention_mask.bool(), strict=True)
        return [(ids[mask].tolist(), labels[mask].tolist()) for ids, labels, mask in rows]
    starts = (batch.position_ids[0] == 0).nonzero()[:, 0].tolist()
    edges = zip(starts, [*starts[1:], batch.input_ids.shape[1]], strict=True)
    return [(batch.input_ids[0, a:b].tolist(), batch.labels[0, a:b].tolist()) for a, b in edges]


@fresh
@given(drawn=documents, max_tokens=limit, max_rows=limit, packing=st.booleans(), data=st.data())
def test_every_example_stands_in_one_batch_once_and_whole(drawn, max_tokens, max_rows, packing, data):
    examples = [example(pairs) for pairs in drawn]
    rows = data.draw(st.lists(st.integers(0, len(examples) - 1), max_size=20))
    batches = micro_batches(
        examples, rows, max_tokens=max_tokens, max_rows=max_rows, packing=packing, pad_id=PAD
    )
    assert sorted(row for batch in batches for row in batch.rows) == sorted(rows)
    for batch in batches:
        assert taken_apart(batch) == [expected(examples[row]) for row in batch.rows]
        assert len(batch.rows) <= (max_rows or len(rows))
        assert batch.input_ids.numel() <= (max_tokens or 10**9) or len(batch.rows) == 1
        for tensor in (batch.input_ids, batch.labels, batch.position_ids, batch.attention_mask):
            assert tensor is None or (tensor.dtype == torch.int64 and tensor.shape == batch.input_ids.shape)


@fresh
@given(drawn=documents, packing=st.booleans())
def test_positions_count_from_the_start_of_each_document(drawn, packing):
    examples = [example(pairs) for pairs in drawn]
    rows = range(len(examples))
    for batch in micro_batches(examples, rows, max_tokens=50, max_rows=None, packing=packing, pad_id=PAD):
        lengths = [len(examples[row].input_ids) for row in batch.rows]
        if packing:
            assert batch.input_ids.shape == (1, sum(lengths))
            assert batch.position_ids[0].tolist() == [i for length in lengths for i in range(length)]
        else:
            assert (batch.position_ids == torch.arange(max(lengths))).all()
            outside = batch.attention_mask == 0
            assert (batch.input_ids[outside] == PAD).all()
            assert (batch.labels[outside] == IGNORE).all()
            assert outside.sum() == max(lengths) * len(lengths) - sum(lengths)


@fresh
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(30, 60))
def test_no_two_packs_fit_into_one(lengths, max_tokens):
    examples = [example([(5, True)] * length) for length in lengths]
    packs = micro_batches(
        examples, range(len(lengths)), max_tokens=max_tokens, max_rows=None, packing=True, pad_id=PAD
    )
    fullness = sorted(sum(lengths[row] for row in pack.rows) for pack in packs)
    assert len(packs) == 1 or fullness[0] + fullness[1] > max_tokens, "two packs would fit into one"


def test_padding_that_equals_eos_hides_neither_the_end_nor_shows_itself():
    short, long = example([(7, False), (8, True), (PAD, True)]), example([(7, False)] + [(9, True)] * 5)
    (batch,) = micro_batches([short, long], [0, 1], max_tokens=None, max_rows=None, packing=False, pad_id=PAD)
    assert batch.labels[batch.rows.index(0)].tolist() == [IGNORE, 8, PAD, IGNORE, IGNORE, IGNORE]


def test_no_rows_make_no_batch():
    for packing in (True, False):
        assert micro_batches([], [], max_tokens=8, max_rows=8, packing=packing, pad_id=PAD) == []


# Order


class Weighted(Examples):
    """Examples with sources and weights, without a folder."""

    def __init__(self, sources, weights):
        self._rows = np.array([[3, 1, source, 0, i] for i, source in enumerate(sources)], dtype="<i4")
        self.weights = weights
        self.of_source = tuple(list(sources).count(source) for source in range(len(weights)))


@fresh
@given(n=st.integers(1, 200), seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 50))
def test_an_epoch_holds_every_example_once_in_an_order_of_its_own(n, seed, epoch):
    examples = [example([(5, True)])] * n
    order = epoch_order(examples, seed, epoch)
    assert sorted(order.tolist()) == list(range(n))
    assert order.tolist() == epoch_order(examples, seed, epoch).tolist()
    if n > 20:
        assert order.tolist() != epoch_order(examples, seed, epoch + 1).tolist()
        assert order.tolist() != epoch_order(examples, seed + 1, epoch).tolist()


@fresh
@given(
    sources=st.lists(st.integers(0, 2), min_size=30, max_size=90).map(lambda s: [0, 1, 2, *s]),
    halves=st.tuples(*[st.integers(1, 7)] * 3),
    seed=st.integers(0, 99),
)
def test_weights_say_how_often_a_source_is_seen(sources, halves, seed):
    examples = Weighted(sources, tuple(half / 2 for half in halves))
    epochs = [epoch_order(examples, seed, epoch) for epoch in range(8)]
    assert {len(order) for order in epochs} == {epoch_length(examples)}
    for source, half in enumerate(halves):
        members = np.flatnonzero(np.array(sources) == source)
        for order in epochs:
            counts = np.bincount(order, minlength=len(sources))[members]
            assert set(counts.tolist()) <= {half // 2, -(-half // 2)}
        total = np.bincount(np.concatenate(epochs), minlength=len(sources))[members]
        assert total.max() - total.min() <= 1 + 8 / len(members)  # every second epoch, not at random
        slack = 8 if half == 1 else 4  # an odd number of examples has no exact half
        assert abs(total.sum() - 4 * half * len(members)) <= slack


# Isolation

KINDS = ["llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "phi3", "granite", "cohere", "mixtral"]
ATTENTION = [(kind, way) for kind in KINDS for way in ("eager", "sdpa") if (kind, way) != ("gemma2", "sdpa")]


def logits(model, batch, mask=None):
    with torch.no_grad():
        return model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=mask, use_cache=False
        ).logits


def packed(*lengths):
    """A pack of random documents, longest first, and the same with another first document."""
    drawn = [torch.randint(5, tiny.VOCABULARY, (length,)).tolist() for length in lengths]
    other = [torch.randint(5, tiny.VOCABULARY, (lengths[0],)).tolist(), *drawn[1:]]
    made = []
    for documents in (drawn, other):
        examples = [example([(t, True) for t in ids]) for ids in documents]
        made += micro_batches(
            examples, range(len(examples)), max_tokens=None, max_rows=None, packing=True, pad_id=PAD
        )
    return made


@pytest.mark.parametrize(("kind", "way"), ATTENTION)
def test_another_document_in_the_pack_changes_no_bit(kind, way):
    model = tiny.model(kind, attn_implementation=way)
    before, after = packed(40, 25, 9)
    assert not torch.equal(before.input_ids, after.input_ids)
    rest = slice(40, None)
    assert torch.equal(logits(model, before)[:, rest], logits(model, after)[:, rest])
    everything = torch.ones_like(before.input_ids)  # the mask that joins documents: the test can fail
    leak = (logits(model, before, everything) - logits(model, after, everything))[:, rest]
    assert leak.abs().max() > 1e-3


@pytest.mark.parametrize(("kind", "way"), ATTENTION)
def test_a_packed_document_computes_what_it_computes_alone(kind, way):
    model = tiny.model(kind, attn_implementation=way)
    (pack_, _) = packed(30, 20, 10)
    start = 0
    for length in (30, 20, 10):
        ids = pack_.input_ids[:, start : start + length]
        with torch.no_grad():
            alone = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(
            logits(model, pack_)[:, start : start + length], alone, atol=1e-6, rtol=1e-5
        )
        start += length


@pytest.mark.parametrize(("kind", "way"), ATTENTION)
def test_models_that_keep_documents_apart_pass(kind, way):
    model = tiny.model(kind, attn_implementation=way)
    check_isolation(model.train())
    assert model.training


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "reason"),
    [("mamba", "carries its state"), ("bloom", "does not read positions"), ("opt", "see each other")],
)
def test_models_that_do_not_are_refused_by_name(kind, reason):
    sizes = {"word_embed_proj_dim": 32, "ffn_dim": 32} if kind == "opt" else {}
    with pytest.raises(UserError, match=f"{kind} .*{reason}") as caught:
        check_isolation(tiny.model(kind, **sizes))
    assert caught.value.code == ExitCode.MODEL


def replaced(monkeypatch, model, arguments):
    """The model with its forward called with other arguments than it was given."""
    forward = model.forward

    def other(input_ids, position_ids, attention_mask, use_cache):
        return forward(input_ids, use_cache=use_cache, **arguments(input_ids, position_ids))

    monkeypatch.setattr(model, "forward", other)
    return model


def test_a_model_that_joins_documents_is_caught(monkeypatch):
    def joined(input_ids, position_ids):
        return {"position_ids": position_ids, "attention_mask": torch.ones_like(input_ids)}

    for kind in KINDS:
        with pytest.raises(UserError, match="see each other"):
            check_isolation(replaced(monkeypatch, tiny.model(kind), joined))


def test_a_model_whose_positions_run_on_is_caught(monkeypatch):
    def apart_but_running_on(input_ids, position_ids):
        document = (position_ids == 0).cumsum(-1)
        mask = (document[:, None, :, None] == document[:, None, None, :]).tril()
        return {"position_ids": torch.arange(input_ids.shape[1])[None], "attention_mask": mask}

    with pytest.raises(UserError, match="does not start its positions again"):
        check_isolation(replaced(monkeypatch, tiny.model("gpt2"), apart_but_running_on))


def test_the_check_leaves_random_numbers_alone():
    model = tiny.model("llama")
    before = torch.get_rng_state()
    check_isolation(model)
    assert torch.equal(before, torch.get_rng_state())
