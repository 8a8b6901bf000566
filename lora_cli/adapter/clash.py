"""What is told of two things that do not go together: by which keys a recipe comes to them, and what to do."""

from dataclasses import fields
from typing import Literal

from lora_cli import parts
from lora_cli.errors import UserError
from lora_cli.presets import PRESETS, Method

MERGEABLE = "a mergeable delta"
"""The fact that ΔW does not depend on the input."""
SHIFTED = "a start that stands for a part of W0"
"""The fact that this part is taken off W0, by the init or by quantising."""
DROPS = "something that drops"
"""The fact that two passes in training mode differ: by dropout of ΔW's input, or by the part of the attention axis."""
ABOUT = {MERGEABLE: "delta", SHIFTED: "init"}
"""Facts that a part's file tells -> the axis of the part."""
KEYS = {
    DROPS: ("adapter.dropout", "set adapter.dropout, or adapter.attention: key_drop"),
    "base.quantized": ("model.quantize", "set model.quantize: nf4"),
    "base.packed": ("model.name", "name a model whose files hold weights, not codes"),
}
"""Other facts than parts and keys -> the key to look at, and what to do where it is needed or in the way."""
TAKEN_BACK = ("adapter.r", "adapter.alpha")
"""Keys that may be null: one variant of several can take them back."""


def forbidden(method: Method, axis: str, name: str, fact: str, reason: str) -> UserError:
    """Of a part, and a fact that it forbids."""
    where, told = _words(method, axis, name), fact
    about = _part_of(method, fact)
    if about is not None:
        key, words = _key(about[0]), _words(method, *about)
        told = f"{fact} ({words})" if fact in ABOUT else words
        fix = _way_out(method, axis, name, key, _by(method, *about))
    elif fact in KEYS:
        key, fix = KEYS[fact]
        words, fix = key, f"leave {key} out" if fact == "base.quantized" else fix
    elif fact.startswith("base."):
        words, fix = "adapter.target_modules", "leave such layers out, by adapter.exclude_modules"
    else:
        words = told = fact if "." in fact else f"adapter.{fact}"
        fix = _way_out(method, axis, name, words, "recipe")
    return UserError(f"cannot be combined with {told}: {reason}", where=where, fix=fix, beside=words)


def missing(method: Method, axis: str, name: str, fact: str, reason: str) -> UserError:
    """Of a part, and a fact that it needs; several, of which one would do, with `or` between them."""
    where, first = _words(method, axis, name), fact.split(" or ")[0]
    other, _, wanted = first.partition(".")
    other = ABOUT.get(first, other)
    if first in KEYS or other not in parts.AXES:
        fix = KEYS[first][1] if first in KEYS else f"set adapter.{first}"
        return UserError(f"needs {fact}: {reason}", where=where, fix=fix)
    standing = method.chosen().get(other, ())
    words = " and ".join(_words(method, other, part.name) for part in standing)
    taken_back: Chooser = "recipe" if other in PRESETS[method.name].parts else "default"
    by = _by(method, other, standing[0].name) if standing else taken_back
    fix = _way_out(method, axis, name, _key(other), by, wanted)
    instead = f", not {words}" if words else ""
    return UserError(f"needs {fact}{instead}: {reason}", where=where, fix=fix, beside=words)


def twice(method: Method, axis: str, name: str) -> UserError:
    """Of a part that stands there more than once."""
    return UserError("stands there twice: each would undo the other", where=_words(method, axis, name))


def _part_of(method: Method, fact: str) -> tuple[str, str] | None:
    """The part that makes a fact true; None where it is none of a part."""
    axis, _, name = fact.partition(".")
    if fact in ABOUT:
        return ABOUT[fact], method.chosen()[ABOUT[fact]][0].name
    if fact == "base.quantized" and method.base is not None:
        return "base", method.base.name
    return (axis, name) if axis in parts.AXES and axis != "base" and name else None


Chooser = Literal["recipe", "method", "default"]


def _by(method: Method, axis: str, name: str) -> Chooser:
    """Who has chosen a part."""
    preset = PRESETS[method.name].parts.get(axis, ()) if method.name in PRESETS else ()
    if name in {part.name for part in (preset if isinstance(preset, tuple) else (preset,))}:
        return "method"
    usual = {each.name: each.default for each in fields(Method)}[axis]
    return "default" if isinstance(usual, parts.Part) and usual.name == name else "recipe"


def _way_out(method: Method, axis: str, name: str, key: str, by: Chooser, wanted: str = "") -> str:
    """What to do about a part and something else, which stands at `key`; `wanted` would do there."""
    own = _by(method, axis, name)
    if own == "recipe" and by != "method":
        if wanted:
            return f"set {key}: {wanted}"
        return "leave one of the two out" if by == "recipe" else f"set {key} to something else"
    if own == "recipe":
        return f"leave {_key(axis)} out, or choose another method"
    if by != "recipe":
        return "choose another method"
    null = ", or set it to null" if key in TAKEN_BACK else ""
    return f"leave {key} out{null}, or choose another method"


def _words(method: Method, axis: str, name: str) -> str:
    """A part in the words of the recipe that leads to it."""
    brought = _by(method, axis, name) == "method"
    return f"adapter.method: {method.name} ({axis}: {name})" if brought else f"{_key(axis)}: {name}"


def _key(axis: str) -> str:
    if axis == "base":
        return "model.quantize"
    return f"{'train' if axis == 'optimizer' else 'adapter'}.{axis}"
