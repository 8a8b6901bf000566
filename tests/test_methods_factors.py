"""Factors chosen for whole documents: by the prompt alone, the same packed, padded, alone, and while generating."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lora_cli.adapter import files
from lora_cli.adapter.reading import Reading, reading, rows_of
from lora_cli.data.example import Example
from lora_cli.data.pack import micro_batches
from lora_cli.evaluate import choice, generation
from lora_cli.evaluate.loss import row_sums
from lora_cli.train.loop import Training, train_steps
from tests import tiny
from tests.adapters import adapted, put_on
from tests.training import Rows, fresh, training

R = 3
SETTINGS: dict[str, Any] = {"method": "mixlora", "r": R, "size": 0.5}


def examples() -> list[Example]:
    """Prompts of 2 to 6 tokens, then answers of 1 to 5."""
    generator, found = fresh(), []
    for _ in range(5):
        prompt, answer = (
            int(torch.randint(low, high, (), generator=generator)) for low, high in ((2, 7), (1, 6))
        )
        ids = torch.randint(5, tiny.VOCABULARY, (prompt + answer,), generator=generator).tolist()
        found.append(Example(tuple(ids), (False,) * prompt + (True,) * answer, "memory"))
    return found


def batches(rows: list[Example], packing: bool, max_rows: int | None = None) -> list[Any]:
    return micro_batches(
        rows, range(len(rows)), max_tokens=None, max_rows=max_rows, packing=packing, pad_id=0
    )


def logits_of(
    model: Any, rows: list[Example], packing: bool, max_rows: int | None = None
) -> dict[int, Tensor]:
    """Row -> logits of its tokens."""
    found: dict[int, Tensor] = {}
    for batch in batches(rows, packing, max_rows):
        with torch.no_grad(), reading(model, batch.reading):
            logits = model(
                batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                use_cache=False,
            ).logits
        if packing:
            lengths = [len(rows[row].input_ids) for row in batch.rows]
            found |= dict(zip(batch.rows, logits[0].split(lengths), strict=True))
        else:
            found |= {row: logits[at, : len(rows[row].input_ids)] for at, row in enumerate(batch.rows)}
    return found


@pytest.mark.parametrize("packing", [False, True])
def test_a_batch_tells_its_documents_and_their_prompts(packing):
    rows = examples()
    for batch in batches(rows, packing):
        told = batch.reading()
        for number, row in enumerate(batch.rows):
            mine = (told.document == number) & (
                True if batch.attention_mask is None else batch.attention_mask.bool()
            )
            assert int(mine.sum()) == len(rows[row].input_ids)
            prompt = batch.input_ids[mine & told.prompt].tolist()
            assert prompt == list(rows[row].input_ids[: rows[row].trained.index(True)])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_document_is_computed_the_same_packed_padded_or_alone(kind):
    model, _ = adapted(kind, **SETTINGS)
    rows = examples()
    alone = logits_of(model, rows, False, max_rows=1)
    for packing in (False, True):
        for row, logits in logits_of(model, rows, packing).items():
            # Another choice of factors would move them by much more than rounding does.
            torch.testing.assert_close(logits, alone[row], rtol=1e-3, atol=2e-3)


def test_no_token_depends_on_one_behind_it():
    model, _ = adapted("llama", **SETTINGS)
    (row, *_) = [row for row in examples() if row.trained.count(True) > 1] or [
        Example((7, 8, 9, 10, 11), (False, False, True, True, True), "memory")
    ]
    other = Example((*row.input_ids[:-1], (row.input_ids[-1] + 1) % 200 + 5), row.trained, "memory")
    first, second = (logits_of(model, [each], False)[0] for each in (row, other))
    assert torch.equal(first[:-1], second[:-1])
    assert not torch.allclose(first[-1], second[-1])


def test_another_prompt_is_given_other_factors():
    _, adapter = adapted("llama", **SETTINGS)
    delta = next(iter(adapter.deltas.values()))
    a, of_a, b, of_b = delta.choose(torch.randn(40, 32, generator=fresh()))
    assert len({tuple(sorted(row)) for row in a.tolist()}) > 5
    for chosen, weights in ((a, of_a), (b, of_b)):
        assert all(len(set(row)) == R for row in chosen.tolist())
        torch.testing.assert_close(weights.mean(-1), torch.ones(40))


def test_delta_is_the_sum_over_the_chosen_factors():
    """The definition, in float64, a document at a time."""
    _, adapter = adapted("llama", **SETTINGS)
    layer = adapter.layers["model.layers.1.mlp.up_proj"]
    delta, x = layer.delta, torch.randn(2, 4, 32, generator=fresh())
    prompt = torch.tensor([[True, True, False, False], [True, True, True, False]])
    delta.reader.now = rows_of(prompt)
    found = delta.add_to(torch.zeros(2, 4, 48), x).double()
    delta.reader.now = None
    tensors = {key: p.detach().double() for key, p in delta.named_parameters()}
    for row in range(2):
        mean = x[row, prompt[row]].double().mean(0)

        def best(shares: Tensor) -> tuple[Tensor, Tensor]:
            order = shares.argsort(descending=True)[:R]
            return order, shares[order] / shares[order].mean()

        a, of_a = best((tensors["router"] @ mean).softmax(0))
        picked = (of_a[:, None] * tensors["A"][a]).mean(0)
        b, of_b = best((tensors["router_b"] @ mean).softmax(0) + (tensors["condition"] @ picked).softmax(0))
        W = delta.scale * (tensors["B"][:, b] * (of_a * of_b)) @ tensors["A"][a]
        torch.testing.assert_close(found[row], x[row].double() @ W.t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [1, 5])
def test_what_is_generated_is_computed_as_its_prompt_was(length):
    """With a cache the new tokens come one by one; the same as the whole text at once, routed by its prompt."""
    model, _ = adapted("llama", **SETTINGS)
    tokenizer = tiny.tokenizer()
    prompts = [tuple(torch.randint(5, 200, (n,), generator=fresh()).tolist()) for n in (length, 8, 3)]
    written = generation._generate(model, tokenizer, prompts, 6, generation._noise(0.0, 0, [0, 1, 2]))
    alone = [
        generation._generate(model, tokenizer, [p], 6, generation._noise(0.0, 0, [0]))[0] for p in prompts
    ]
    assert written == alone
    for prompt, answer in zip(prompts, written, strict=True):
        ids = torch.tensor([[*prompt, *answer]])
        mask = torch.arange(ids.shape[1])[None] < len(prompt)
        with torch.no_grad(), reading(model, lambda mask=mask: rows_of(mask)):
            logits = model(ids, use_cache=False).logits[0]
        assert logits.argmax(-1)[len(prompt) - 1 : -1].tolist() == list(answer)


def test_scores_of_choices_are_those_of_the_loss():
    model, _ = adapted("llama", **SETTINGS)
    rows = examples()
    sums = row_sums(model, rows, device=torch.device("cpu"), max_tokens=64, pad_id=0)[:, 0]
    parts = [(row.input_ids[: (n := row.trained.index(True))], row.input_ids[n:]) for row in rows]
    found = choice.log_probabilities(
        model, [prompt for prompt, _ in parts], [[answer] for _, answer in parts], max_tokens=64, pad_id=0
    )
    torch.testing.assert_close(
        -torch.tensor([score for (score,) in found]).double(), sums, rtol=1e-4, atol=1e-4
    )


def test_a_step_is_the_same_however_it_is_split_packed_or_recomputed():
    rows, found = Rows(12), []
    for micro, packing, again in ((6, False, False), (1, False, False), (6, True, False), (2, False, True)):
        run: Training = training(
            {"method": "mixlora"},
            {"micro_batch_size": micro, "batch_size": 6, "max_steps": 4, "gradient_checkpointing": again},
            rows=rows,
        )
        run.packing = packing
        losses = [report.loss for report in train_steps(run)]
        found.append((losses, run.adapter.trainable()))
    for losses, tensors in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-5)
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, found[0][1][name], rtol=1e-3, atol=1e-5)


def test_a_saved_adapter_comes_back_to_the_bit(tmp_path):
    model, adapter = adapted("gpt2", **SETTINGS)
    rows = examples()
    expected = logits_of(model, rows, False)
    files.save(tmp_path, adapter, "the/base", None)
    again = tiny.model("gpt2")
    put_on(again, tmp_path)
    found = logits_of(again, rows, False)
    assert all(torch.equal(found[row], expected[row]) for row in expected)


def test_without_being_told_each_row_is_a_document_and_all_of_it_its_prompt():
    model, _ = adapted("llama", **SETTINGS)
    ids = torch.randint(5, 200, (3, 7), generator=fresh())
    told = Reading(torch.arange(3)[:, None].expand(3, 7), torch.ones(3, 7, dtype=torch.bool), 3)
    with torch.no_grad():
        plain = model(ids).logits
        with reading(model, lambda: told):
            assert torch.equal(model(ids).logits, plain)
