"""`lora methods`: read from the presets and the files' docstrings; nothing heavy is imported."""

from typing import Any

from lora_cli import parts, presets
from lora_cli.errors import UserError
from lora_cli.screen import Screen


def listing(screen: Screen) -> None:
    """All methods, then all parts by axis."""
    screen.heading("methods (adapter.method)")
    rows = [(name, each.title, each.paper) for name, each in presets.PRESETS.items()]
    screen.table(["name", "what it is", "paper"], rows)
    for axis, question in parts.AXES.items():
        screen.heading(f"{axis}: {question}")
        screen.table(["name", ""], [(name, _without_name(axis, name)) for name in parts.names(axis)])
    screen.note("\nlora methods NAME explains one.")


def explain(name: str, screen: Screen) -> None:
    """A preset with its parts, or every part of that name.

    Raises:
        UserError: nothing is called that.
    """
    found = [axis for axis in parts.AXES if name in parts.names(axis)]
    if name in presets.PRESETS:
        _explain_preset(name, screen)
    elif not found:
        known = [*presets.PRESETS, *(part for axis in parts.AXES for part in parts.names(axis))]
        raise UserError(f"no method or part is called '{name}'", fix=parts.did_you_mean(name, known))
    for axis in found:
        screen.heading(f"{axis}: {name}")
        screen.note(parts.docstring(axis, name))
        _settings(axis, name, screen)
        screen.note(f"\nin a recipe: {_written(axis, name)}   file: lora_cli/methods/{axis}/{name}.py")


def _explain_preset(name: str, screen: Screen) -> None:
    preset = presets.PRESETS[name]
    screen.heading(preset.title)
    screen.note(f"{preset.paper}\n\n{preset.when}\n")
    chosen = presets.Method(name=name, **preset.parts).chosen()
    rows = [
        (axis, part.name, _set(part.settings), _without_name(axis, part.name))
        for axis, found in chosen.items()
        for part in found
    ]
    screen.table(["axis", "part", "with", ""], rows)
    for key, value in preset.keys.items():
        screen.note(
            f"default of adapter.{key}: {value if isinstance(value, int | str) else ', '.join(value)}"
        )
    own = [(axis, part.name) for axis in preset.parts for part in chosen[axis]]
    for axis, part in own:
        _settings(axis, part, screen)
    screen.note(f"\nin a recipe: adapter: {{method: {name}}}   each part: lora methods PART")


def _settings(axis: str, name: str, screen: Screen) -> None:
    """What can be set under the name of a part."""
    declared = parts.declared(axis, name)
    if declared:
        screen.heading(f"settings of {axis}: {name}")
        screen.table(
            ["key", "default", ""], [(key, _plain(default), meaning) for key, default, meaning in declared]
        )


def _written(axis: str, name: str) -> str:
    if axis == "base":
        if parts.defines(axis, name, "quantise"):
            return f"model: {{quantize: {name}}}"
        return "chosen by the model's files" if parts.defines(axis, name, "reads") else "chosen by the layer"
    return f"{'train' if axis == 'optimizer' else 'adapter'}: {{{axis}: {name}}}"


def _set(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {_plain(value)}" for key, value in settings.items())


def _plain(value: Any) -> str:
    return "null" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _without_name(axis: str, name: str) -> str:
    return parts.summary(axis, name).removeprefix(f"{name}: ")
