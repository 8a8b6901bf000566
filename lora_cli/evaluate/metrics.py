"""Numbers out of answers: exact match, BLEU and chrF, and how far a share of a few rows can be trusted."""

from collections.abc import Iterable, Sequence
from math import sqrt
from typing import Any

from lora_cli.errors import UserError

NORMAL_95 = 1.959963984540054
"""97.5 % quantile of the normal distribution."""


def exact_match(answer: str, references: Iterable[str]) -> bool:
    """Whether the answer is one of the references, spaces around them aside."""
    return answer.strip() in {reference.strip() for reference in references}


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU, 0 to 100, with sacrebleu's default settings (13a, exp smoothing).

    Args:
        answers: one per row, without white space around it.
        references: for each row at least one text; rows may have different numbers of them.
    """
    return _corpus_score(sacrebleu().BLEU(force=True), answers, references)


def chrf(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus chrF2, 0 to 100, with sacrebleu's default settings. Arguments as for `bleu`."""
    return _corpus_score(sacrebleu().CHRF(), answers, references)


def sacrebleu() -> Any:
    """Sacrebleu's metrics.

    Raises:
        UserError: it is not installed.
    """
    try:
        from sacrebleu import metrics
    except ImportError as error:
        what, fix = "bleu and chrf need the package sacrebleu", 'pip install "lora-cli[metrics]"'
        raise UserError(what, where="eval.metrics", fix=fix) from error
    return metrics


def wilson(right: int, total: int) -> tuple[float, float]:
    """95 % interval for a share of which `right` of `total` were seen (Wilson 1927): also sensible near 0 and 1."""
    share, z2 = right / total, NORMAL_95**2
    middle = share + z2 / (2 * total)
    reach = NORMAL_95 * sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    scale = 1 + z2 / total
    return max((middle - reach) / scale, 0.0), min((middle + reach) / scale, 1.0)


def _corpus_score(metric: Any, answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Sacrebleu wants the first references of all rows, then all second ones ...; None where a row has no more."""
    most = max(len(each) for each in references)
    by_place = [[each[place] if place < len(each) else None for each in references] for place in range(most)]
    return metric.corpus_score([answer.strip() for answer in answers], by_place).score
