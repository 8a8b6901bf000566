"""What was found, as JSON that later runs add to, and as a Markdown table."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scripts.faults.lab import SYSTEMS, Finding

NOT_RUN = "not run"


def add(path: Path, findings: Iterable[Finding], about: dict[str, Any]) -> dict[str, Any]:
    """Put findings into the file of results, in place of older ones of the same fault and system."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"findings": []}
    new = {(each.fault, each.system): asdict(each) for each in findings}
    kept = [each for each in known["findings"] if (each["fault"], each["system"]) not in new]
    results = {"about": about, "findings": [*kept, *new.values()]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return results


def table(results: dict[str, Any], questions: dict[str, str]) -> str:
    """A line a fault, a column a system: how often it did what the promise asks, and what happened."""
    found = {(each["fault"], each["system"]): each for each in results["findings"]}
    lines = [["", "fault, and what is asked", *SYSTEMS.values()], ["---"] * (len(SYSTEMS) + 2)]
    for name, question in questions.items():
        lines.append([name, question, *(_cell(found.get((name, system))) for system in SYSTEMS)])
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([rows, "", *(f"- {name}: {what}" for name, what in results["about"].items()), ""])


def _cell(finding: dict[str, Any] | None) -> str:
    if finding is None:
        return NOT_RUN
    said = finding["said"].replace("|", "\\|")
    if ";" not in said:  # always the same
        said = said.removeprefix(f"{finding['tried']} ")
    return f"**{finding['ok']} of {finding['tried']}**<br>{said}"
