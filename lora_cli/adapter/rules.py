"""Which parts go together: each part's file says what it `needs` and what it `forbids`, here it is asked.

Both map a fact to a reason. A fact is a chosen part, `init.zero_a`, or something about the model or the recipe:
`dropout`, `lora_bias`, `base.embedding` ...
"""

from collections.abc import Collection

from lora_cli import parts
from lora_cli.errors import UserError
from lora_cli.presets import Method


def facts_of(method: Method) -> set[str]:
    """What is known from the recipe alone."""
    facts = {f"{axis}.{part.name}" for axis, part in method.chosen().items()}
    if method.dropout.settings.get("p"):
        facts.add("dropout")
    return facts


def check(method: Method, facts: Collection[str]) -> None:
    """Report every rule that the method breaks.

    Raises:
        UserError: with the reason that the part gives.
    """
    broken: list[UserError] = []
    for axis, part in method.chosen().items():
        module = parts.load(axis, part.name)
        where = f"adapter.{axis}: {part.name}"
        broken += [
            UserError(f"cannot be combined with {fact}: {reason}", where=where)
            for fact, reason in getattr(module, "forbids", {}).items()
            if fact in facts
        ]
        broken += [
            UserError(f"needs {fact}: {reason}", where=where)
            for fact, reason in getattr(module, "needs", {}).items()
            if fact not in facts
        ]
    if broken:
        raise UserError.several(broken)
