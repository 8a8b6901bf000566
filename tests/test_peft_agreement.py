"""The figures of README's table of agreement with PEFT are made of rounding alone, where nothing else is said."""

import pytest

pytest.importorskip("peft")

from scripts import peft_agreement

pytestmark = [
    pytest.mark.oracle,
    # transformers' own, about itself
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


@pytest.mark.parametrize("kind", peft_agreement.KINDS)
@pytest.mark.parametrize("case", peft_agreement.CASES, ids=lambda case: case.method)
def test_methods_are_pefts(case, kind):
    found = peft_agreement.measured(case, kind)
    if found is None:
        return
    forward, merged, losses = found
    assert forward < 3e-6
    assert merged < 3e-6
    as_peft_has_it = case.optimizer is peft_agreement.lorafa
    assert losses < (1e-2 if as_peft_has_it else 5e-6)
