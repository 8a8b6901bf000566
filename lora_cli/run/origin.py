"""What a run was started with. It goes on only with the same recipe, rows and base, but for what the user allows."""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path

from lora_cli import io_ops
from lora_cli import model as models
from lora_cli.data.source import fingerprint
from lora_cli.errors import ExitCode, UserError
from lora_cli.recipe.dump import text, to_yaml
from lora_cli.recipe.load import load
from lora_cli.recipe.schema import Recipe
from lora_cli.run.folder import RunFolder

NOT_TRAINED = {"output.dir", "compare.variants", "train.parallel"}
"""Keys that say nothing about what is learned: a run folder may be moved, and its base shared out otherwise."""

Contents = dict[str, dict[str, str]]
"""Key of the recipe -> name of a file (or id on the Hub) that it stands for -> fingerprint."""


def contents(recipe: Recipe) -> Contents:
    """What the recipe names but does not hold: the base model, the rows, the chat template."""
    data = recipe.data
    found = {
        "model.name": models.fingerprint(recipe.model),
        "data.train": dict(fingerprint(data.train, "train")),
    }
    if data.eval is not None:
        found["data.eval"] = dict(fingerprint(data.eval, "eval"))
    template = Path(data.chat_template).expanduser()
    if template.is_file():
        found["data.chat_template"] = {str(template): hashlib.sha256(template.read_bytes()).hexdigest()}
    return found


def write(folder: RunFolder, recipe: Recipe, held: Contents) -> None:
    """Keep both in the run folder; the recipe, by which a run is known, last."""
    io_ops.write_json(folder.origin, held)
    io_ops.write_text(folder.recipe, to_yaml(recipe))


def check_recipe(folder: RunFolder, recipe: Recipe, allowed: Collection[str]) -> None:
    """Refuse another recipe than that of the run, if there is a run.

    Raises:
        UserError: with every key that differs and is not allowed to.
    """
    if not folder.recipe.exists():
        return
    was, now = _values(load(folder.recipe).recipe), _values(recipe)
    changes = {key: f"{key} was {was[key]}, is {now[key]}" for key in now if was[key] != now[key]}
    _refuse(folder, "the run here has another recipe", changes, allowed)


def check_contents(folder: RunFolder, now: Contents, allowed: Collection[str]) -> None:
    """Refuse other rows or another base than the run was started with, under whatever name.

    Raises:
        UserError: with every file that differs and is not allowed to.
    """
    if not folder.origin.exists():
        return
    try:
        was: Contents = json.loads(folder.origin.read_text(encoding="utf-8"))
        changes = {
            key: f"{key}: {_changed(was.get(key, {}), now[key])}" for key in now if was.get(key) != now[key]
        }
    except (OSError, ValueError, AttributeError) as error:
        what = f"cannot be read ({error})"
        fix = "remove it to go on without comparing rows and base with what the run was started with"
        raise UserError(what, where=str(folder.origin), fix=fix, code=ExitCode.DISK) from error
    _refuse(folder, "the run here was started with other files", changes, allowed)


def _values(recipe: Recipe) -> dict[str, str]:
    """Dotted key -> value as YAML."""
    sections = recipe.model_dump(mode="json")
    values = {f"{name}.{key}": text(value) for name, keys in sections.items() for key, value in keys.items()}
    return {key: value for key, value in values.items() if key not in NOT_TRAINED}


def _changed(was: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Names of the files that are not the same."""
    names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    return f"{', '.join(names)} changed"


def _refuse(folder: RunFolder, what: str, changes: Mapping[str, str], allowed: Collection[str]) -> None:
    """`allowed` holds keys, and sections that stand for all of their keys."""
    left = {key: line for key, line in changes.items() if not {key, key.partition(".")[0]} & set(allowed)}
    if left:
        allow = " ".join(f"--allow-change {key}" for key in left)
        fix = f"go on with what is in {folder.recipe}, or all the same with {allow}, or start anew with --output"
        where = str(folder.root)
        raise UserError("\n  ".join([f"{what}:", *left.values()]), where=where, fix=fix, code=ExitCode.LOCKED)
