"""Which parts go together: each part's file says what it `needs` and what it `forbids`, here it is asked.

Both map a fact to a reason, or are functions of the part's settings that do. A fact is a chosen part, `init.zero_a`;
`dropout`; a key of `adapter` that the recipe sets, `lora_bias`, or of `train` that it changes, `train.betas`; a kind
of base, `base.embedding`; how it is kept, `base.quantized`, and `base.packed` where it is on disk so; or what the
files of the parts say of them, MERGEABLE, SHIFTED and DROPS.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Literal

from lora_cli import parts, presets
from lora_cli.adapter import clash
from lora_cli.adapter.clash import DROPS, MERGEABLE, SHIFTED
from lora_cli.errors import UserError
from lora_cli.parts import Part
from lora_cli.presets import Method
from lora_cli.recipe.schema import AdapterRecipe


def facts_of(method: Method, adapter: AdapterRecipe | None = None, bases: Iterable[str] = ()) -> set[str]:
    """What is known before anything is computed.

    Args:
        method: the chosen parts.
        adapter: the section of the recipe as it is written.
        bases: kinds of the layers to be adapted.
    """
    facts = {
        fact
        for axis, chosen in method.chosen().items()
        for part in chosen
        for fact in of_part(axis, part.name)
    }
    if method.dropout.settings.get("p"):
        facts |= {"dropout", DROPS}
    if drops := getattr(parts.load("attention", method.attention.name), "drops", None):
        facts |= {DROPS} if drops(**parts.settings("attention", method.attention)) else set()
    if method.base is not None:
        facts.add("base.quantized")
    if adapter is not None:
        usual = {key: field.default for key, field in AdapterRecipe.model_fields.items()}
        others = {*parts.AXES, "r"}  # a plan has an r in any case
        facts |= {key for key, value in adapter if value and value != usual[key] and key not in others}
        if presets.with_defaults(adapter).train_also:
            facts.add("train_also")
    return facts | {f"base.{kind}" for kind in bases}


def of_part(axis: str, name: str) -> set[str]:
    """What is known where a part is chosen."""
    facts, file = {f"{axis}.{name}"}, parts.load(axis, name)
    if axis == "delta" and getattr(file, "mergeable", True):
        facts.add(MERGEABLE)
    if getattr(file, "shifts", False):
        facts.add(SHIFTED)
    return facts


def is_mergeable(method: Method) -> bool:
    """Whether one weight stands for ΔW, whatever the input."""
    return MERGEABLE in of_part("delta", method.delta.name)


def check(method: Method, facts: Collection[str]) -> None:
    """Report every rule that the method breaks.

    Raises:
        UserError: with the reason that the part gives.
    """
    chosen = [(axis, part) for axis, found in method.chosen().items() for part in found]
    broken = [error for axis, part in chosen for error in _broken(method, axis, part, facts)]
    counts = Counter((axis, part.name) for axis, part in chosen)
    broken += [clash.twice(method, *each) for each, count in counts.items() if count > 1]
    if broken:
        raise UserError.several(broken)


def _broken(method: Method, axis: str, part: Part, facts: Collection[str]) -> Iterable[UserError]:
    for fact, reason in stated("forbids", axis, part).items():
        if fact in facts:
            yield clash.forbidden(method, axis, part.name, fact, reason)
    for fact, reason in stated("needs", axis, part).items():
        if not any(each in facts for each in fact.split(" or ")):
            yield clash.missing(method, axis, part.name, fact, reason)


def stated(kind: Literal["needs", "forbids"], axis: str, part: Part) -> Mapping[str, str]:
    """What the part's file says with these settings."""
    found = getattr(parts.load(axis, part.name), kind, {})
    return found if isinstance(found, Mapping) else found(**parts.settings(axis, part))
