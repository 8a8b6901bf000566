"""Which parts go together: each part's file says what it `needs` and what it `forbids`, here it is asked.

Both map a fact to a reason, or are functions of the part's settings that do. A fact is a chosen part, `init.zero_a`;
`dropout`; a key of `adapter` that the recipe sets, `lora_bias`, or of `train` that it changes, `train.betas`; a kind
of base, `base.embedding`; how it is kept, `base.quantized`, and `base.packed` where it is on disk so; or that one
weight stands for ΔW, MERGEABLE.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Literal

from lora_cli import parts
from lora_cli.errors import UserError
from lora_cli.parts import Part
from lora_cli.presets import Method
from lora_cli.recipe.schema import AdapterRecipe

MERGEABLE = "a mergeable delta"
"""The fact that ΔW does not depend on the input."""


def facts_of(method: Method, adapter: AdapterRecipe | None = None, bases: Iterable[str] = ()) -> set[str]:
    """What is known before anything is computed.

    Args:
        method: the chosen parts.
        adapter: the section of the recipe, for the keys that it sets.
        bases: kinds of the layers to be adapted.
    """
    facts = {f"{axis}.{part.name}" for axis, chosen in method.chosen().items() for part in chosen}
    if method.dropout.settings.get("p"):
        facts.add("dropout")
    if is_mergeable(method):
        facts.add(MERGEABLE)
    if method.base is not None:
        facts.add("base.quantized")
    if adapter is not None:
        facts |= {key for key in adapter.model_fields_set if getattr(adapter, key)} - set(parts.AXES)
    return facts | {f"base.{kind}" for kind in bases}


def is_mergeable(method: Method) -> bool:
    """Whether one weight stands for ΔW, whatever the input."""
    return getattr(parts.load("delta", method.delta.name), "mergeable", True)


def check(method: Method, facts: Collection[str]) -> None:
    """Report every rule that the method breaks.

    Raises:
        UserError: with the reason that the part gives.
    """
    chosen = [(axis, part) for axis, found in method.chosen().items() for part in found]
    broken = [error for axis, part in chosen for error in _broken(axis, part, facts)]
    for (axis, name), count in Counter((axis, part.name) for axis, part in chosen).items():
        if count > 1:
            broken.append(
                UserError("stands there twice: each would undo the other", where=_where(axis, name))
            )
    if broken:
        raise UserError.several(broken)


def _broken(axis: str, part: Part, facts: Collection[str]) -> Iterable[UserError]:
    where = _where(axis, part.name)
    for fact, reason in stated("forbids", axis, part).items():
        if fact in facts:
            yield UserError(f"cannot be combined with {fact}: {reason}", where=where)
    for fact, reason in stated("needs", axis, part).items():
        if not any(each in facts for each in fact.split(" or ")):
            yield UserError(f"needs {fact}: {reason}", where=where)


def stated(kind: Literal["needs", "forbids"], axis: str, part: Part) -> Mapping[str, str]:
    """What the part's file says with these settings."""
    found = getattr(parts.load(axis, part.name), kind, {})
    return found if isinstance(found, Mapping) else found(**parts.settings(axis, part))


def _where(axis: str, name: str) -> str:
    if axis == "base":
        return f"model.quantize: {name}"
    return f"{'train' if axis == 'optimizer' else 'adapter'}.{axis}: {name}"
