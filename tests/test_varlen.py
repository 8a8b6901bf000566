"""A packed row on a GPU: one kernel for all documents computes what each alone does; held by a plain kernel."""

import random
from dataclasses import replace
from functools import partial, wraps
from inspect import signature
from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lora_cli import attention, varlen
from lora_cli.adapter.reading import reading
from lora_cli.data.example import Example
from lora_cli.data.pack import check_isolation, inputs, micro_batches
from lora_cli.errors import UserError
from lora_cli.recipe.schema import Recipe
from lora_cli.run import prepare
from lora_cli.train.loss import loss_sum
from lora_cli.train.recompute import recompute
from lora_cli.varlen import Asked, Documents
from tests import tiny
from tests.training import NO_DROPOUT, fresh

KINDS = ("llama", "qwen3", "gemma3_text", "gpt2", "granite", "cohere", *varlen.WINDOWED)
SLIDING = ("gemma3_text", *varlen.WINDOWED)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SERVED = Asked("cuda", (9, 0), torch.bfloat16, 128, 128, reach=2**20)


def plain(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """What `varlen_attn` is documented to compute, pair by pair, with the checks that it makes."""
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert cu_seq_q.dtype is torch.int32
    assert max_q == max_k == max(cu_seq_q.diff())
    assert enable_gqa or query.shape[1] == key.shape[1]
    groups = query.shape[1] // key.shape[1]
    made = []
    for start, end in pairwise(cu_seq_q):
        rows = []
        for at in range(start, end):
            left, right = window_size
            first = start if left < 0 else max(start, at - left)
            last = end if right < 0 else min(end, at + right + 1)
            seen = (
                key[first:last].repeat_interleave(groups, 1),
                value[first:last].repeat_interleave(groups, 1),
            )
            scores = torch.einsum("hw,khw->hk", query[at], seen[0]) * (scale or query.shape[-1] ** -0.5)
            rows.append(torch.einsum("hk,khw->hw", scores.softmax(-1), seen[1]))
        made.append(torch.stack(rows))
    return torch.cat(made)


def lengths_of(generator, count=5):
    return [int(torch.randint(1, 9, (), generator=generator)) for _ in range(count)]


def documents(lengths, device=CPU):
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Documents(tuple(lengths), ends, device)


class Layer(torch.nn.Module):
    """As much of a layer as attention looks at."""

    is_causal, num_key_value_groups = True, 3


# One kernel


def test_the_plain_kernel_takes_what_pytorchs_takes():
    taken = signature(varlen_attn).parameters
    assert [*signature(plain).parameters][:7] == [*taken][:7]
    assert {"scale", "window_size"} <= {*taken}


@pytest.mark.parametrize("sliding", [None, 1, 4, 100])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_one_kernel_for_all_documents_computes_what_each_alone_does(sliding, scaling):
    generator = fresh()
    told = documents([20, *lengths_of(generator)])
    tokens, found = sum(told.lengths), []
    made = [torch.randn(1, heads, tokens, 8, generator=generator, dtype=torch.float64) for heads in (6, 2, 2)]
    weights = torch.randn(1, tokens, 6, 8, generator=generator, dtype=torch.float64)
    for one in (True, False):
        q, k, v = (t.clone().requires_grad_() for t in made)
        how = {"scaling": scaling, "sliding_window": sliding}
        used = partial(varlen.together, kernel=plain) if one else partial(varlen.apart, module=Layer())
        y = used(told, query=q, key=k, value=v, **how)
        (y * weights).sum().backward()
        found.append((y, q.grad, k.grad, v.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_kernel_that_sees_groups_by_itself_is_not_told_of_them():
    def before(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        """As in PyTorch 2.11."""
        return plain(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size,
            enable_gqa=True,
        )  # fmt: skip

    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    told = documents([2, 3])
    a, b = (varlen.together(told, q, k, k, kernel=kernel) for kernel in (before, plain))
    assert torch.equal(a, b)


def test_under_autocast_the_kernel_is_given_what_is_computed_in():
    given = []

    def kernel(query, key, value, *_, **__):
        given.extend(t.dtype for t in (query, key, value))
        return query

    q = torch.randn(1, 2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        varlen.together(documents([2, 3]), q, q, q.bfloat16(), kernel=kernel)
    assert given == [torch.bfloat16] * 3


# The choice


def test_one_kernel_serves_16_bits_on_a_gpu_of_ampere_or_later():
    assert varlen.in_one(SERVED)
    assert varlen.in_one(replace(SERVED, dtype=torch.float16, capability=(8, 6)))
    for other in (
        {"device": "cpu"},
        {"capability": (7, 5)},
        {"capability": (0, 0)},
        {"dtype": torch.float32},
        {"dtype": torch.float64},
        {"width": 36, "value_width": 36},
        {"width": 264, "value_width": 264},
        {"value_width": 64},
        {"reach": 2**31},
        {"more": True},
    ):
        assert not varlen.in_one(replace(SERVED, **other)), other


@pytest.mark.parametrize(("capability", "served"), [((8, 0), True), ((9, 0), True), ((8, 9), False)])
def test_wide_heads_have_a_backward_pass_on_some_gpus_only(capability, served):
    assert varlen.in_one(replace(SERVED, width=256, value_width=256, capability=capability)) == served
    assert varlen.in_one(replace(SERVED, width=192, value_width=192, capability=capability))


@pytest.mark.parametrize("more", [{"softcap": 30.0}, {"s_aux": 1}, {"dropout": 0.1}, {"position_bias": 1}])
def test_what_the_kernel_has_not_is_left_to_attention_document_by_document(more):
    q = torch.empty(1, 4, 5, 8, dtype=torch.bfloat16)
    told = documents([2, 3], CUDA)
    nothing = {"softcap": None, "s_aux": None, "dropout": 0.0, "scaling": 0.5, "sliding_window": 3}
    assert varlen.in_one(varlen._asked(q, q, told, nothing))
    assert not varlen.in_one(varlen._asked(q, q, told, {**nothing, **more}))


def test_documents_are_told_apart_without_a_mask_where_layers_say_all_they_ask_for():
    for kind in KINDS:
        model = tiny.model(kind)
        assert varlen.serves(model, CUDA), kind
        assert attention.skips(model, CUDA)
        assert not varlen.serves(model, CPU)
    chunked = tiny.model()
    chunked.config.layer_types = ["chunked_attention", "full_attention"]
    both_ways = tiny.model()
    both_ways.model.layers[1].self_attn.is_causal = False
    never = tiny.model()
    never._supports_flash_attn = False
    eager = tiny.model()
    eager.set_attn_implementation("eager")
    silent = tiny.model("phimoe", sliding_window=6)
    for model in (chunked, both_ways, never, eager, silent, tiny.model("gpt_oss")):
        assert not attention.skips(model, CUDA)


# In a model


def packed():
    generator = fresh()
    ids = [
        torch.randint(5, tiny.VOCABULARY, (n,), generator=generator).tolist()
        for n in (20, *lengths_of(generator))
    ]
    rows = [Example(tuple(row), (True,) * len(row), "") for row in ids]
    settings = {"max_tokens": None, "max_rows": None, "pad_id": 0}
    return micro_batches(rows, range(len(rows)), packing=True, **settings)[0]


def result(model, **given):
    with reading(model, given.pop("read")):
        logits = model(**given).logits
        logits.square().sum().backward()
    return logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("how", ["apart", "together", "recomputed"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_of_told_documents_are_those_of_the_masked_row(kind, how, monkeypatch):
    batch, number = packed(), random.getrandbits(16)
    config = {"sliding_window": 6} if kind in SLIDING else NO_DROPOUT if kind == "gpt2" else {}
    model = tiny.model(kind, number, **config)
    rows = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    expected = result(model, read=batch.reading, **rows)
    model = tiny.model(kind, number, **config)
    varlen.use(model)
    given, used = inputs(model, batch, CPU), []
    if how != "apart":
        monkeypatch.setattr(varlen, "HALF", (torch.float32,))
        AttentionInterface.register(varlen.NAME, partial(varlen.attend, kernel=watched(used)))
        given["documents"] = replace(given["documents"], device=CUDA)
    if how == "recomputed":
        recompute(model)
        model.train()
    found = result(model, read=batch.reading, **given)
    assert len(used) == {"apart": 0, "together": 2, "recomputed": 4}[how]
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max())


def watched(used):
    @wraps(plain)
    def kernel(*given, **how):
        used.append(how["window_size"])
        return plain(*given, **how)

    return kernel


def test_the_model_is_told_the_documents_of_packed_rows_only():
    model, batch = tiny.model(), packed()
    assert "documents" not in inputs(model, batch, CPU)
    varlen.use(model)
    told = inputs(model, batch, CPU)["documents"]
    assert told.lengths == tuple(told.ends.diff().tolist())
    assert sum(told.lengths) == batch.input_ids.numel()
    assert told.ends.dtype is torch.int32
    rows = [Example((5, 6, 7), (True,) * 3, "")] * 2
    padded = micro_batches(rows, [0, 1], max_tokens=None, max_rows=None, packing=False, pad_id=0)[0]
    assert "documents" not in inputs(model, padded, CPU)
    assert inputs(model, padded, CPU)["attention_mask"].shape == padded.input_ids.shape


def test_the_loss_of_a_packed_row_is_that_of_its_padded_rows():
    generator, model = fresh(), tiny.model()
    rows = []
    for n in (7, *lengths_of(generator)):
        ids = torch.randint(5, tiny.VOCABULARY, (n,), generator=generator).tolist()
        rows.append(Example(tuple(ids), (True,) * n, ""))
    varlen.use(model)
    losses = []
    for packing in (True, False):
        found = micro_batches(
            rows, range(len(rows)), max_tokens=None, max_rows=None, packing=packing, pad_id=0
        )
        losses.append(sum(loss_sum(model, batch, CPU) for batch in found))
    torch.testing.assert_close(*losses)


def test_isolation_is_tried_out_and_a_model_that_drops_what_it_is_told_is_refused(monkeypatch):
    model = tiny.model()
    varlen.use(model)
    check_isolation(model)
    AttentionInterface.register(
        varlen.NAME, lambda *given, documents=None, **how: varlen.attend(*given, **how)
    )
    with pytest.raises(UserError, match="see each other"):
        check_isolation(model)


@pytest.mark.parametrize("wanted", [True, "auto"])
def test_a_model_that_drops_what_it_is_told_packs_by_masks_where_packing_is_asked_for(monkeypatch, wanted):
    model = tiny.model()
    recipe = Recipe.model_validate({"model": {"name": "m"}, "data": {"train": "x", "packing": wanted}})
    monkeypatch.setattr(attention, "skips", lambda model: True)
    monkeypatch.setattr(attention, "use", varlen.use)
    monkeypatch.setattr(varlen, "attend", lambda *given, documents=None, **how: attend(*given, **how))
    attend = sdpa_attention_forward
    assert prepare._packs(recipe, model) is (wanted is True)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("sliding", [None, 4])
def test_on_a_gpu_the_shapes_are_right_and_nothing_asks_for_a_number(sliding):
    """Fake tensors have none: whoever asked would wait for a GPU, layer by layer."""
    with FakeTensorMode():
        q, k = (torch.empty(1, heads, 16, 8, dtype=torch.float16, device="cuda") for heads in (6, 2))
        told, used = Documents((5, 2, 9), torch.empty(4, dtype=torch.int32, device="cuda"), CUDA), []
        how = {"scaling": 0.5, "sliding_window": sliding, "kernel": counted(used)}
        y, _ = varlen.attend(Layer(), q, k, k, None, told, **how)
    assert (y.shape, y.dtype, y.device.type) == ((1, 16, 6, 8), torch.float16, "cuda")
    assert used == [(sliding - 1 if sliding else -1, 0)]


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind != "mixtral"]
)  # PyTorch fakes its experts in bf16
def test_a_model_runs_through_pytorchs_own_kernel_without_numbers(kind):
    used = []
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        model = tiny.model(kind)
        varlen.use(model)
        AttentionInterface.register(varlen.NAME, partial(varlen.attend, kernel=counted(used)))
        told = Documents((5, 2, 9), torch.empty(4, dtype=torch.int32), CUDA)
        ids, mask = torch.zeros(1, 16, dtype=torch.int64), torch.empty(1, 1, 1, 1, dtype=torch.bool)
        logits = model(ids, position_ids=ids, attention_mask=mask, documents=told, use_cache=False).logits
        logits.sum().backward()
    assert logits.shape == (1, 16, tiny.VOCABULARY)
    assert all(p.grad.shape == p.shape for p in model.parameters())
    assert len(used) == 2


def counted(used):
    @wraps(varlen_attn)
    def kernel(*given, **how):
        used.append(how["window_size"])
        return varlen_attn(*given, **how)

    return kernel
