"""The registry of parts: the folder `methods/<axis>/` is the list, the file name is the name in the recipe.

Nothing is imported to list, name or describe parts; `load` imports the one that is used.
"""

import ast
import difflib
import importlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from lora_cli.errors import UserError

METHODS = Path(__file__).parent / "methods"

AXES = {
    "base": "how W0 is stored",
    "delta": "what ΔW is",
    "combine": "how W0 and ΔW make W",
    "init": "the first ΔW",
    "scale": "the factor s(alpha, r) in front of ΔW",
    "trainable": "which tensors of ΔW train",
    "rank": "how many columns B has in each layer, and when",
    "lifecycle": "what happens between steps",
    "dropout": "what is dropped from ΔW's input while training",
    "attention": "what a token sees while training",
    "optimizer": "how gradients become steps",
}


@dataclass(frozen=True)
class Part:
    """A part that a recipe or a preset names, and the settings written under its name."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict[str, Any])


@cache
def names(axis: str) -> tuple[str, ...]:
    """The parts of an axis, in alphabetical order."""
    return tuple(sorted(path.stem for path in (METHODS / axis).glob("*.py") if path.stem != "__init__"))


def nearest(word: str, known: Iterable[str], count: int = 1) -> list[str]:
    """The known words that look most like `word`; empty when none is close."""
    return difflib.get_close_matches(word, list(known), n=count, cutoff=0.6)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """What to tell someone who wrote `word`: the nearest known word, or all of them."""
    known = list(known)
    close = nearest(word, known)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"


def load(axis: str, name: str) -> ModuleType:
    """Import the file of a part.

    Raises:
        UserError: there is no such part.
    """
    if name not in names(axis):
        raise UserError(
            f"unknown {axis} '{name}'", where=f"adapter.{axis}", fix=did_you_mean(name, names(axis))
        )
    return importlib.import_module(f"lora_cli.methods.{axis}.{name}")


def settings(axis: str, part: Part) -> dict[str, Any]:
    """A part's settings as its file's functions take them: checked, and with the defaults that the file declares."""
    declared = getattr(load(axis, part.name), "Settings", None)
    return {} if declared is None else dict(declared.model_validate(part.settings))


def docstring(axis: str, name: str) -> str:
    """The documentation of a part, read from its file without importing it."""
    return ast.get_docstring(_parsed(axis, name)) or ""


def declared(axis: str, name: str) -> list[tuple[str, Any, str]]:
    """The settings of a part with their defaults and meanings, read from its file without importing it."""
    classes = [node for node in _parsed(axis, name).body if isinstance(node, ast.ClassDef)]
    fields = [field for node in classes if node.name == "Settings" for field in node.body]
    found: list[tuple[str, Any, str]] = []
    for each in fields:
        if (
            isinstance(each, ast.AnnAssign)
            and isinstance(each.target, ast.Name)
            and isinstance(each.value, ast.Call)
        ):
            said = {word.arg: ast.literal_eval(word.value) for word in each.value.keywords if word.arg}
            found.append((each.target.id, said.get("default"), str(said.get("description", ""))))
    return found


def defines(axis: str, name: str, word: str) -> bool:
    """Whether a part's file has a function of that name, read from it without importing it."""
    return any(isinstance(node, ast.FunctionDef) and node.name == word for node in _parsed(axis, name).body)


def _parsed(axis: str, name: str) -> ast.Module:
    return ast.parse((METHODS / axis / f"{name}.py").read_text(encoding="utf-8"))


def summary(axis: str, name: str) -> str:
    """The first line of a part's documentation."""
    return docstring(axis, name).partition("\n")[0]
