"""Scores of given answers: what they are, and that batching, padding and sharing change nothing."""

import random

import pytest
import torch

from lora_cli.errors import UserError
from lora_cli.evaluate import choice
from tests import tiny

KINDS = ["llama", "gpt2", "gemma2", "gemma3_text", "granite", "cohere", "mixtral"]


def drawn(seed: int, longest_answer: int = 4):
    """Random prompts and answers of different lengths."""
    draw = random.Random(seed)

    def ids(most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(5, tiny.VOCABULARY) for _ in range(draw.randint(1, most)))

    prompts = [ids(20) for _ in range(9)]
    return prompts, [[ids(longest_answer) for _ in range(3)] for _ in prompts]


def brute_force(model, prompt, answer) -> float:
    """One unbatched, unpadded forward pass per answer, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0]
    assert logits.dtype == torch.float64
    log_p = logits.log_softmax(-1)
    return sum(log_p[len(prompt) - 1 + at, token].item() for at, token in enumerate(answer))


@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_a_loop_over_single_answers_in_float64(kind):
    prompts, answers = drawn(seed=len(kind))
    found = choice.log_probabilities(tiny.model(kind), prompts, answers, max_tokens=64, pad_id=0)
    exact = tiny.model(kind).double()
    exact.set_experts_implementation("eager")  # the grouped kernel of mixtures has no float64
    for prompt, candidates, scores in zip(prompts, answers, found, strict=True):
        expected = [brute_force(exact, prompt, answer) for answer in candidates]
        assert scores == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("max_tokens", [1, 40, 100_000])
def test_scores_do_not_depend_on_the_batch(max_tokens):
    prompts, answers = drawn(seed=1)
    model = tiny.model()
    alone = [
        choice.log_probabilities(model, [prompt], [candidates], max_tokens=1, pad_id=0)[0]
        for prompt, candidates in zip(prompts, answers, strict=True)
    ]
    together = choice.log_probabilities(model, prompts, answers, max_tokens=max_tokens, pad_id=7)
    for one, other in zip(alone, together, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_a_prompt_with_answers_of_one_token_is_read_once():
    prompts, _ = drawn(seed=2)
    prompts = list(dict.fromkeys(prompts))
    model, read = tiny.model(), []
    model.register_forward_pre_hook(lambda _, args, given: read.append(given["input_ids"]), with_kwargs=True)
    answers = [[(5,), (6,), (7,)] for _ in prompts]
    choice.log_probabilities(model, prompts, answers, max_tokens=50, pad_id=0)
    assert sum(len(ids) for ids in read) == len(prompts)
    assert all(ids.numel() <= 50 for ids in read)


def test_identical_inputs_with_another_border_keep_their_own_scores():
    model, text = tiny.model(), (9, 8, 7, 6)
    prompts, answers = [text[:1], text[:2]], [[text[1:]], [text[2:]]]
    found = choice.log_probabilities(model, prompts, answers, max_tokens=100, pad_id=0)
    exact = model.double()
    expected = [brute_force(exact, p, a[0]) for p, a in zip(prompts, answers, strict=True)]
    assert [scores[0] for scores in found] == pytest.approx(expected, abs=2e-5)


def test_every_answer_is_counted_once():
    prompts, answers = drawn(seed=3)
    counted = []
    choice.log_probabilities(tiny.model(), prompts, answers, max_tokens=50, pad_id=0, advance=counted.append)
    assert sum(counted) == sum(map(len, answers))


def test_modes_are_put_back_and_dropout_is_off():
    model = tiny.model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    prompts, answers = drawn(seed=4)
    state = torch.get_rng_state()
    first = choice.log_probabilities(model, prompts, answers, max_tokens=50, pad_id=0)
    assert first == choice.log_probabilities(model, prompts, answers, max_tokens=50, pad_id=0)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.lm_head._forward_pre_hooks


def test_a_model_that_is_not_finite_is_an_error():
    model = tiny.model()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="not a finite number"):
        choice.log_probabilities(model, [(5, 6)], [[(7,), (8,)]], max_tokens=50, pad_id=0)


def test_default_choices_are_the_distinct_answers_up_to_twenty():
    assert choice.distinct([" b", " a", " b"]) == (" a", " b")
    assert len(choice.distinct(str(number) for number in range(20))) == 20
    for answers in (["only"], [str(number) for number in range(21)]):
        with pytest.raises(UserError, match="2 to 20") as caught:
            choice.distinct(answers)
        assert caught.value.where == "eval.choices"


def test_an_input_longer_than_the_model_reads_is_an_error():
    model = tiny.model(max_position_embeddings=8)
    choice.log_probabilities(model, [(5,) * 6], [[(6,), (7, 8)]], max_tokens=50, pad_id=0)
    with pytest.raises(UserError, match="do not fit"):
        choice.log_probabilities(model, [(5,) * 7], [[(6,), (7, 8)]], max_tokens=50, pad_id=0)
