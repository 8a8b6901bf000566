"""Numbers out of answers, against sacrebleu called by hand and against simulation."""

import random
import sys

import pytest
import sacrebleu

from lora_cli.errors import UserError
from lora_cli.evaluate import metrics

WORDS = ["the", "a", "pub", "near", "river", "serves", "cheap", "food,", "good", "family.", "not", "It", "is"]


def drawn(seed: int):
    """Random answers with one to four references each; a few answers are right."""
    draw = random.Random(seed)

    def sentence() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))

    references = [[sentence() for _ in range(draw.randint(1, 4))] for _ in range(30)]
    answers = [draw.choice(each) if draw.random() < 0.3 else sentence() for each in references]
    return answers, references


@pytest.mark.parametrize("seed", range(3))
def test_corpus_scores_equal_sacrebleu_by_hand(seed):
    answers, references = drawn(seed)
    padded = [[*each, *[None] * (4 - len(each))] for each in references]
    by_place = [[each[place] for each in padded] for place in range(4)]
    assert metrics.bleu(answers, references) == sacrebleu.corpus_bleu(answers, by_place).score
    assert metrics.chrf(answers, references) == sacrebleu.corpus_chrf(answers, by_place).score
    single = [each[:1] for each in references]
    assert metrics.bleu(answers, single) == sacrebleu.corpus_bleu(answers, [[r for (r,) in single]]).score


def test_more_references_never_lower_the_scores_and_the_right_answer_scores_100():
    answers, references = drawn(9)
    assert metrics.chrf(answers, [[each[0]] for each in references]) <= metrics.chrf(answers, references)
    longest = [max(each, key=len) for each in references]
    assert metrics.bleu(longest, references) == pytest.approx(100)
    assert metrics.chrf(longest, references) == pytest.approx(100)


def test_missing_sacrebleu_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(UserError) as caught:
        metrics.bleu(["a"], [["a"]])
    assert "lora-cli[metrics]" in caught.value.fix


def test_exact_match_ignores_only_the_space_around():
    assert metrics.exact_match(" yes\n", ["no", "yes "])
    assert not metrics.exact_match("Yes", ["yes"])
    assert not metrics.exact_match("ye s", ["yes"])


@pytest.mark.parametrize("share", [0.02, 0.5, 0.83])
def test_interval_covers_the_truth_about_95_times_in_100(share):
    draw, rows, runs = random.Random(7), 300, 2000
    covered = 0
    for _ in range(runs):
        low, high = metrics.wilson(sum(draw.random() < share for _ in range(rows)), rows)
        covered += low <= share <= high
    assert 0.93 <= covered / runs <= 0.985


def test_interval_stays_inside_0_and_1_and_is_not_empty():
    for total in (1, 2, 300):
        for right in (0, total):
            low, high = metrics.wilson(right, total)
            assert 0 <= low < high <= 1
            assert low - 1e-12 <= right / total <= high + 1e-12
