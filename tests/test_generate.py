"""Answers that a model writes: what they are, batched or not, streamed or not."""

import itertools
import random
import threading

import pytest
import torch
from transformers import GenerationConfig

from lora_cli.errors import UserError
from lora_cli.evaluate import generation
from tests import tiny

KINDS = ["llama", "gpt2", "gemma2", "gemma3_text", "mixtral"]


def drawn(seed: int, count: int = 7) -> list[tuple[int, ...]]:
    draw = random.Random(seed)
    return [tuple(draw.choices(range(40, 120), k=draw.randint(1, 20))) for _ in range(count)]


def argmax_loop(model, prompt, stop, length: int) -> list[int]:
    """The definition: one token after the other, without padding or a cache."""
    ids = list(prompt)
    while len(ids) < len(prompt) + length:
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token in stop:
            break
        ids.append(token)
    return ids[len(prompt) :]


def written(model, prompts, tokenizer=None, **settings):
    tokenizer = tokenizer or tiny.tokenizer()
    return generation.answers(model, tokenizer, prompts, **{"max_new_tokens": 8, "batch_size": 4, **settings})


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_equal_an_argmax_loop(kind):
    model, tokenizer, prompts = tiny.model(kind, seed=3), tiny.tokenizer(), drawn(len(kind))
    expected = [
        tokenizer.decode(argmax_loop(model, prompt, (4,), 8), skip_special_tokens=True) for prompt in prompts
    ]
    assert written(model, prompts) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_answers_do_not_depend_on_the_batch(temperature):
    model, prompts = tiny.model(), drawn(5)
    one_by_one = written(model, prompts, batch_size=1, temperature=temperature, seed=3)
    for batch_size in (2, 3, 100):
        together = written(model, prompts, batch_size=batch_size, temperature=temperature, seed=3)
        assert together == one_by_one


def test_each_token_that_ends_an_answer_ends_it():
    """The tokenizer's, the ones in the model's settings, and the template's end of turn, which differ here."""
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = "<eos>"
    model = tiny.model()
    model.generation_config.eos_token_id = [50, 51]
    assert set(generation.stop_ids(model, tokenizer)) == {2, 50, 51, 4}
    for token in (2, 50, 51, 4):
        say = itertools.cycle([60, 61, token, 62])

        def choose(module, inputs, logits, say=say):
            chosen = torch.full_like(logits, -1.0)
            chosen[..., next(say)] = 1.0
            return chosen

        handle = model.lm_head.register_forward_hook(choose)
        assert written(model, [(70, 71)], tokenizer) == [tokenizer.decode([60, 61])]
        say = itertools.cycle([60, 61, token, 62])
        handle.remove()


def test_settings_of_the_model_change_nothing_and_are_put_back():
    prompts, plain = drawn(6), tiny.model()
    expected = written(plain, prompts)
    model = tiny.model()
    own = GenerationConfig(
        do_sample=True, temperature=3.0, repetition_penalty=5.0, suppress_tokens=list(range(90)), num_beams=3
    )
    model.generation_config = own
    assert written(model, prompts) == expected
    assert model.generation_config is own


def test_modes_and_random_numbers_are_put_back():
    model = tiny.model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5).train()
    model.transformer.h[1].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    written(model, drawn(7), temperature=1.0)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_draws_follow_the_softmax_at_the_temperature():
    """The first token that many prompts draw has the distribution that the model states, sharpened by T."""
    model, tokenizer, temperature, count = tiny.model(), tiny.tokenizer(), 0.5, 4000
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = torch.full((tiny.VOCABULARY,), -1e9)
    logits[60:64] = p.log()
    model.lm_head.register_forward_hook(lambda module, inputs, output: logits.expand_as(output))
    texts = written(
        model, [(70,)] * count, max_new_tokens=1, batch_size=1000, temperature=temperature, seed=11
    )
    shares = torch.tensor([texts.count(tokenizer.decode([token])) / count for token in range(60, 64)])
    expected = p ** (1 / temperature) / (p ** (1 / temperature)).sum()
    error = (expected * (1 - expected) / count).sqrt()
    assert ((shares - expected).abs() < 4.5 * error).all()
    assert ((p - expected).abs() > 9 * error).any()


def test_seeds_give_the_same_answers_again_and_others_differ():
    model, prompts = tiny.model(), drawn(8)
    first, again, other = (written(model, prompts, temperature=2.0, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_streamed_pieces_join_to_the_answer(temperature):
    model, tokenizer = tiny.model(seed=4), tiny.tokenizer()
    for prompt in drawn(9, count=4):
        settings = {"max_new_tokens": 12, "temperature": temperature, "seed": 5}
        pieces = list(generation.stream(model, tokenizer, prompt, **settings))
        assert len(pieces) > 1
        assert "".join(pieces) == generation.answers(model, tokenizer, [prompt], batch_size=1, **settings)[0]


def test_a_character_of_several_tokens_is_one_piece():
    tokenizer = tiny.tokenizer()
    pieces = generation._Pieces(tokenizer, [4])
    pieces.put(torch.tensor([[5, 6]]))
    text = "aé€🙂\n b"
    for token in tokenizer.encode(text):
        pieces.put(torch.tensor([token]))
    pieces.put(torch.tensor([4]))
    pieces.end()
    assert [pieces.queue.get_nowait() for _ in text] == list(text)
    assert pieces.queue.empty()


def test_closing_a_stream_stops_the_model():
    model, read = tiny.model(), []
    model.register_forward_pre_hook(lambda *_: read.append(1))
    before = threading.active_count()
    answer = generation.stream(model, tiny.tokenizer(), (60, 61), max_new_tokens=400)
    next(answer)
    answer.close()
    assert threading.active_count() == before
    assert len(read) < 200


def test_an_error_while_streaming_reaches_the_reader():
    model = tiny.model()
    with pytest.raises(UserError, match="do not fit") as caught:
        list(generation.stream(model, tiny.tokenizer(), (60,) * 500, max_new_tokens=13))
    assert "512" in caught.value.fix
    assert list(generation.stream(model, tiny.tokenizer(), (60,) * 500, max_new_tokens=12)) is not None


def test_every_answer_is_counted_once_and_no_prompt_gives_no_answer():
    counted: list[int] = []
    written(tiny.model(), drawn(10), advance=counted.append)
    assert counted == [4, 3]
    assert written(tiny.model(), []) == []
