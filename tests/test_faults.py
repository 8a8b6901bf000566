"""The harness of faults: its arithmetic, its table, and this tool under one of them."""

import json
import random
from pathlib import Path

import pytest
import yaml

from scripts.faults import inputs, ours, report
from scripts.faults.lab import OTHER, SAME, SYSTEMS, Finding, Outcome, tally
from scripts.faults.task import Task

TASK = Task(model="model", rows="rows.jsonl", out="runs/it")


@pytest.fixture
def outcome(tmp_path: Path) -> Outcome:
    return Outcome(1, 0.5, tmp_path / "a.log")


def test_what_happened_is_counted_and_the_most_frequent_comes_first():
    found = tally("P1", "ours", [OTHER, SAME, SAME], {SAME})
    assert (found.tried, found.ok, found.said) == (3, 2, f"2 {SAME}; 1 {OTHER}")


def test_what_ended_with_errors_stands_together():
    found = tally("P1", "ours", ["ended with A", SAME, "ended with B", "ended with A"], {SAME})
    assert found.said == f"1 {SAME}; 3 ended with A, B"


def test_the_last_error_is_the_reason(outcome: Outcome):
    outcome.log.write_text(
        "Traceback (most recent call last):\nKeyError: 'a'\n\nDuring handling of that:\n"
        "FileNotFoundError: [Errno 2] No such file or directory: '/tmp/x/checkpoint-4/trainer_state.json'\n"
    )
    assert outcome.reason == "FileNotFoundError (trainer_state.json)"


def test_an_error_names_no_place_of_this_machine(outcome: Outcome):
    outcome.log.write_text("ValueError: Can't find a valid checkpoint at /tmp/x/checkpoint-4\n")
    assert outcome.reason == "ValueError (Can't find a valid checkpoint at …)"


def test_without_an_error_the_exit_code_is_the_reason(outcome: Outcome):
    assert outcome.reason == "exit 1"
    assert Outcome(-9, 0.5, outcome.log).reason == "signal 9"


def test_newer_findings_take_the_place_of_older_ones(tmp_path: Path):
    path = tmp_path / "results" / "faults.json"
    report.add(path, [Finding("P1", "ours", 3, 1, "old"), Finding("P2", "ours", 1, 1, "kept")], {})
    found = report.add(path, [Finding("P1", "ours", 4, 4, "new")], {"Machine": "a"})["findings"]
    assert {each["fault"]: each["said"] for each in found} == {"P1": "new", "P2": "kept"}
    assert json.loads(path.read_text())["findings"] == found


def test_what_was_not_run_stands_in_the_table(tmp_path: Path):
    results = report.add(
        tmp_path / "f.json", [Finding("P1", "ours", 3, 2, "2 a; 1 b")], {"Raw logs": "there"}
    )
    head, _, line, *foot = report.table(results, {"P1": "a kill"}).splitlines()
    assert head.split(" | ")[2:] == [*list(SYSTEMS.values())[:-1], f"{[*SYSTEMS.values()][-1]} |"]
    assert line.startswith("| P1 | a kill | **2 of 3**<br>2 a; 1 b | ")
    assert line.count(report.NOT_RUN) == len(SYSTEMS) - 1
    assert "- Raw logs: there" in foot


def test_what_was_always_the_same_is_not_counted_twice(tmp_path: Path):
    results = report.add(tmp_path / "f.json", [Finding("P1", "ours", 3, 3, f"3 {SAME}")], {})
    assert f"**3 of 3**<br>{SAME} |" in report.table(results, {"P1": "a kill"})


def test_the_mistakes_are_mistakes():
    """Each kind but the cut one, which may only take the last line end, gives another text."""
    base = yaml.safe_dump(ours.recipe_of(TASK), sort_keys=False)
    rng = random.Random(0)
    for kind, mistaken in inputs.MISTAKES.items():
        changed = [mistaken(rng, base) for _ in range(20)]
        assert sum(each != base.encode() for each in changed) >= 15, kind


def test_a_misspelt_key_is_another_key():
    base = yaml.safe_dump(ours.recipe_of(TASK), sort_keys=False)
    rng = random.Random(0)
    for _ in range(50):
        changed = inputs.MISTAKES["misspelt"](rng, base).decode()
        assert [line.partition(":")[2] for line in changed.splitlines()] == [
            line.partition(":")[2] for line in base.splitlines()
        ]
        assert changed != base.rstrip("\n")


def test_a_misspelt_key_that_was_read_was_passed_over():
    assert inputs._read("read", "misspelt") == inputs.MISSPELT
    assert inputs._read("read", "moved") == inputs.READ
    assert inputs._read("refused", "misspelt") == inputs.REFUSED
    assert inputs._read("traceback", "cut") == "traceback"


def test_this_tool_under_mistaken_recipes(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Its own side of the harness: what it says of each recipe is one line of JSON."""
    base, rng = yaml.safe_dump(ours.recipe_of(TASK), sort_keys=False), random.Random(0)
    paths = [tmp_path / f"{number}.yaml" for number in range(40)]
    for path in paths:
        path.write_bytes(inputs._mistaken(rng, base)[1])
    ours.read(Task("", "", "", configs=tuple(map(str, paths))))
    ended = [json.loads(line)[0] for line in capfd.readouterr().out.splitlines()]
    assert len(ended) == len(paths)
    assert "refused" in ended
    assert "traceback" not in ended
