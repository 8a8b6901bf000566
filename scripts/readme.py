"""Write the generated tables of README.md: recipe keys, methods, parts; --check says whether they are current."""

import json
import re
import sys
from pathlib import Path
from typing import Any

from lora_cli import io_ops, parts, presets
from lora_cli.recipe import schema
from lora_cli.screen import size

README = Path(__file__).parents[1] / "README.md"
RESULTS = Path(__file__).parent / "bench" / "results"
FAULTS = Path(__file__).parent / "faults" / "results" / "faults.md"


def main() -> int:
    """Rewrite what stands between the markers; with --check return 1 when it is not current."""
    text = README.read_text(encoding="utf-8")
    current = filled(text)
    if "--check" in sys.argv:
        return int(current != text)
    io_ops.write_text(README, current)
    return 0


def filled(text: str) -> str:
    """README with every generated table as it should be."""
    tables = {"methods": methods(), "parts": all_parts(), "keys": keys()}
    tables |= {name: compared(RESULTS / f"{name}.json") for name in ("family", "gradient-view")}
    tables["speed"] = "\n".join(path.read_text(encoding="utf-8") for path in sorted(RESULTS.glob("*.md")))
    tables["faults"] = counts(FAULTS.read_text(encoding="utf-8"))
    for name, made in tables.items():
        text = between(text, name, "scripts/readme.py", made)
    return text


def between(text: str, name: str, script: str, made: str) -> str:
    """Text with `made` between the markers of `name`."""
    begin, end = f"<!-- {name}: made by {script} -->", f"<!-- end of {name} -->"
    head, found, rest = text.partition(begin)
    assert found, f"README.md has no line {begin}"
    return f"{head}{begin}\n{made}\n{end}{rest.partition(end)[2]}"


def write(name: str, script: str, made: str) -> None:
    """Put what another script has measured between its markers."""
    io_ops.write_text(README, between(README.read_text(encoding="utf-8"), name, script, made))


def counts(table: str) -> str:
    """Of the table of faults the counts, without all that happened, and the first two notes."""
    lines = [
        re.sub(r"<br>.*?(?= \| )", "", f"{line} ") for line in table.splitlines() if line.startswith("|")
    ]
    notes = [line for line in table.splitlines() if line.startswith("- ")][:2]
    return "\n".join([*(line.rstrip() for line in lines), "", *notes])


def methods() -> str:
    """The presets."""
    rows = [f"| `{name}` | {each.title} | {_paper(each.paper)} |" for name, each in presets.PRESETS.items()]
    return "\n".join(["| `adapter.method` | what it is | paper |", "|---|---|---|", *rows])


def all_parts() -> str:
    """The axes and their parts."""
    rows = [
        f"| {axis} | {question} | {', '.join(f'`{name}`' for name in parts.names(axis))} |"
        for axis, question in parts.AXES.items()
    ]
    return "\n".join(["| axis | the question it answers | parts |", "|---|---|---|", *rows])


def keys() -> str:
    """Every key of a recipe with its meaning."""
    lines = ["| key | meaning |", "|---|---|"]
    for section, field in schema.Recipe.model_fields.items():
        model = field.annotation
        assert isinstance(model, type)
        assert issubclass(model, schema.Section)
        if not model.model_fields:
            lines.append(f"| `{section}` | {' '.join((model.__doc__ or '').split())} |")
        for key, each in model.model_fields.items():
            lines.append(f"| `{section}.{key}` | {(each.description or '').replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def compared(path: Path) -> str:
    """What `lora compare` has found: compare.json of a finished comparison."""
    found = json.loads(path.read_text(encoding="utf-8"))
    base = found["base"]["loss"]["mean"]
    lines = ["| method | held-out loss | below the base's | forgetting | trained | adapter | peak memory |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for variant in found["variants"]:
        mean = {key: each["mean"] for key, each in variant["summary"].items()}
        numbers = f"{size(mean['trained_parameters'])} | {size(mean['adapter_bytes'])}B"
        scores = f"{_spread(variant['summary']['loss'])} | {base - mean['loss']:.2f}"
        forgetting = _spread(variant["summary"]["forgetting"])
        memory = f"{size(mean['peak_memory_bytes'])}B"
        lines.append(f"| `{variant['name']}` | {scores} | {forgetting} | {numbers} | {memory} |")
    return "\n".join(lines)


def _spread(known: dict[str, Any]) -> str:
    """The mean, over several seeds with its interval."""
    interval = known["interval"]
    return f"{known['mean']:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def _paper(paper: str) -> str:
    number = paper.removeprefix("arXiv:")
    return f"[{paper}](https://arxiv.org/abs/{number})" if number != paper else paper


if __name__ == "__main__":
    sys.exit(main())
