"""Run the tests of single parts and of combinations, and write how often each law was held into README.md.

`python -m scripts.conformance`, with the extra `dev`; half a minute on two cores. A law is counted where a test has
checked it and passed; nothing is written where one fails.
"""

import datetime
import sys
from collections import Counter
from typing import Any, cast

import pytest
import torch

from lora_cli import parts
from scripts import readme

TESTS = (
    "tests/test_core_conformance.py",
    "tests/test_methods_combine.py",
    "tests/test_methods_stored.py",  # bases that only come with a model's files
)
LAYERS = {
    "linear": "linear",
    "conv1d": "conv1d",
    "embedding": "embedding",
    "conv2d": "convolution",
    "conv3d": "convolution",
    "expert": "expert",
}
"""Kinds of layers in the tests -> part of the axis `base`."""
Found = dict[str, dict[str, Any]]
"""Combination -> its `parts` and the laws that it `held`."""


class Counts:
    """A pytest plugin: what the tests that passed have checked."""

    def __init__(self) -> None:
        self.own: Counter[tuple[str, str]] = Counter()
        """(part, layer and type) -> checks of the law of the part's axis; one check may be of two parts."""
        self.checks = 0
        self.combinations: Found = {}

    def pytest_runtest_makereport(self, item: pytest.Function, call: pytest.CallInfo[None]) -> None:
        """After each phase of a test."""
        if call.when != "call" or call.excinfo is not None:
            return
        for name, found in cast("list[tuple[str, dict[str, Any]]]", item.user_properties):
            merged = {*self.combinations.get(name, {"held": ()})["held"], *found["held"]}
            self.combinations[name] = {"parts": found["parts"], "held": merged}
        own = own_checks(item.callspec.params) if hasattr(item, "callspec") else []
        self.own.update(own)
        self.checks += bool(own)


def own_checks(params: dict[str, Any]) -> list[tuple[str, str]]:
    """The parts that a test with these parameters is about, and on what; parameters are called as the axes."""
    kind = params.get("kind")
    dtype = "bf16" if params.get("dtype") is torch.bfloat16 else "fp32"
    where = f"{LAYERS[kind]} {dtype}" if kind in LAYERS else "alone"
    tested = {axis: params[axis] for axis in parts.AXES if axis in params}
    tested |= {"base": LAYERS[kind]} if kind in LAYERS else {}
    return [(f"{axis}.{name}", where) for axis, name in tested.items()]


def table(counts: Counts, laws: list[str]) -> str:
    """One row a part: its own law by layer, then the laws that combinations with it were held to."""
    names = [f"{axis}.{name}" for axis in parts.AXES for name in parts.names(axis)]
    head = [
        "part",
        "Linear",
        "Conv1D",
        "Embedding",
        "Conv2d, Conv3d",
        "expert",
        "alone",
        "combinations",
        *laws,
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(row(name, counts, laws) for name in names)])


def row(part: str, counts: Counts, laws: list[str]) -> str:
    """Cells of own checks are float32 + bfloat16."""
    own = [
        cell(counts.own[part, f"{layer} fp32"], counts.own[part, f"{layer} bf16"])
        for layer in dict.fromkeys(LAYERS.values())
    ]
    beside = [each["held"] for each in counts.combinations.values() if part in each["parts"]]
    held = [sum(law in each for each in beside) for law in laws]
    numbers = [str(number or "—") for number in (counts.own[part, "alone"], len(beside), *held)]
    return f"| `{part}` | {' | '.join([*own, *numbers])} |"


def cell(wide: int, narrow: int) -> str:
    """How many in float32 + bfloat16."""
    return f"{wide} + {narrow}" if wide or narrow else "—"


def summary(counts: Counts) -> str:
    """The sentence above the table."""
    held = sum(len(each["held"]) for each in counts.combinations.values())
    date = datetime.date.today().strftime("%-d %B %Y")
    return (
        f"{counts.checks} checks of single parts and {held} of {len(counts.combinations)} random combinations, torch "
        f"{torch.__version__.partition('+')[0]}, {date}; none failed."
    )


def main() -> int:
    """Run, count, write."""
    counts = Counts()
    code = pytest.main([*TESTS, "-n0", "-p", "no:randomly"], plugins=[counts])
    if code == 0:
        from tests.test_methods_combine import LAWS  # pytest wants to be the first to import it

        laws = "\n".join(f"- **{law}**: {meaning}" for law, meaning in LAWS.items())
        every = f"{laws}\n\n{table(counts, list(LAWS))}"
        folded = f"<details><summary>Every part</summary>\n\n{every}\n\n</details>"
        readme.write("conformance", "scripts/conformance.py", f"{summary(counts)}\n\n{folded}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
