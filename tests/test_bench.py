"""The pure parts of the speed benchmark; nothing here looks at a clock."""

import random
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tests import tiny

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "bench"))

import flops
import ratios
import report
import system
import workloads
from ours import Rows

from lora_cli.data.pack import epoch_order

SMOLLM2 = flops.Sizes(frozen=106_168_320, head=28_311_552, lora=4_884_480, attention=30 * 576)


@pytest.mark.parametrize(
    ("labelled", "attended", "gflop"),
    [(1, 256, 0.598), (1, 512, 0.629), (1, 1024, 0.691), (0.25, 256, 0.513), (0.25, 512, 0.544)],
)
def test_flops_of_a_token_of_smollm2(labelled: float, attended: float, gflop: float):
    """Counted by hand: 0.425 for the linears, 0.113 for the head, 0.029 for the adapter, the rest attention."""
    assert flops.per_token(SMOLLM2, labelled, attended) / 1e9 == pytest.approx(gflop, abs=6e-4)


def test_a_row_of_two_lengths_attends_by_the_square():
    """Two rows of 1 and 3 tokens: the mean token stands in a row of (1·1 + 3·3) / 4 tokens."""
    rows = [{"input_ids": [5] * n, "trained": [1] * n} for n in (1, 3)]
    found = workloads.facts(rows, batch_size=2)
    assert found["attended"] == 2.5
    assert found["padding"] == 6 / 4
    assert found["labelled"] == 2 / 4  # never the first one of a row
    assert found["tokens_per_step"] == 4


# Ratios


def result(tokens: list[int], seconds: list[float], **other: float) -> dict[str, Any]:
    """What a process prints; its first step has no duration."""
    plain = {"peak_rss_bytes": 1.0, "first_step_s": 1.0, "probe": 2e11}
    return {"real_tokens": tokens, "step_s": seconds, "step_cpu_s": seconds, **plain, **other}


def test_only_timed_steps_count():
    """Steps of 100 tokens: two to warm up, one of them without a duration, then 2 s and 3 s."""
    assert ratios.speed(result([100] * 4, [50.0, 2.0, 3.0]), timed=2) == 40


def test_ratios_are_made_in_pairs():
    """Ours is twice as fast in each round; the machine is ten times slower in the second."""
    pairs = [(result([100, 100], [s]), result([100, 100], [2 * s], peak_rss_bytes=4.0)) for s in (1.0, 10.0)]
    found = ratios.compared(pairs, timed=1)
    assert found["speed"] == {"median": 2, "min": 2, "max": 2, "count": 2}
    assert found["peak_rss_bytes"]["median"] == 0.25


def test_a_pair_needs_a_steady_machine():
    """Its own speed moved by 4 %, and by 6 %."""
    runs = [{"system": name, **result([1, 1], [1.0])} for name in ("ours", "c", "ours", "c")]
    for run, probed in zip(runs, (1.0, 1.04, 1.06, 1.0), strict=True):
        run["probe"] = probed
    workload = {"rounds": [runs[:2], runs[2:]], "timed": 1}
    assert report.pairs_of(workload, "c") == [(runs[0], runs[1])]
    counts = [report.ratio(workload, "c", kind)["count"] for kind in ("speed", "first_step_s", report.PEAK)]
    assert counts == [1, 1, 2]  # bytes are the same on a slow machine


@pytest.mark.parametrize("against", [["b"], ["b", "c"]])
def test_everybody_stands_beside_us_and_on_both_sides(against: list[str]):
    """ABBA: over two rounds each other system runs once before us and once after us."""
    rounds = ratios.order(against, 2)
    for name in against:
        apart = [each.index(name) - each.index(ratios.OURS) for each in rounds]
        assert sorted(apart) == [-1, 1]


def test_the_table_shows_what_was_measured():
    """One round against c only, and twice against ourselves."""
    runs = [
        {"system": "ours", **result([100, 100], [2.0])},
        {"system": "c", **result([100, 100], [3.0], peak_rss_bytes=2.0)},
    ]
    found = {
        "device": "a processor",
        "model": "a model",
        "versions": {"b": {"trl": "1.0"}},
        "systems": {"ours": "this tool", "b": "TRL", "c": "a loop"},
        "workloads": {
            "C1": {
                "title": "chat",
                "timed": 1,
                "facts": {"padding": 1.2, "labelled": 0.3},
                "limit": {"tokens_per_second": 100.0, "flops_per_second": 2e11},
                "rounds": [runs],
                "noise": [[{"system": "ours", **result([100, 100], [s])} for s in (2.0, 2.5)]],
            }
        },
    }
    shown = report.table(found)
    assert "| 50 | 50% |" in shown
    assert "**1.50** (1.50 to 1.50, n=1)" in shown
    assert "**0.50** (0.50 to 0.50, n=1)" in shown
    assert "against itself 0.800 to 1.250" in shown
    assert report.picture(found).startswith(b"\x89PNG")


# Workloads


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> workloads.Sources:
    """A byte-level tokenizer, and text enough for the longest row."""
    folder = tmp_path_factory.mktemp("sources")
    e2e, text = folder / "e2e.jsonl", folder / "text.txt"
    e2e.write_text('{"mr": "name : A", "text": "A is a place ."}\n' * 500)
    text.write_text("Rivers begin in high places. " * 100)
    return workloads.Sources(tiny.tokenizer(), e2e, (text,))


@pytest.mark.parametrize("workload", [*workloads.CPU, workloads.PARITY], ids=lambda each: each.name)
def test_rows_are_the_same_each_time_and_enough(
    workload: workloads.Workload, sources: workloads.Sources, tmp_path: Path
):
    """What is written is what every process reads: a row for each place of each step, something learned in all."""
    paths = [tmp_path / name for name in ("first", "second")]
    rows, _ = (workloads.write(workload, sources, path) for path in paths)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert len(rows) == workload.steps * workload.batch_size
    assert all(len(row["trained"]) == len(row["input_ids"]) and any(row["trained"][1:]) for row in rows)


def test_the_kinds_of_rows_are_what_they_are_called(sources: workloads.Sources):
    """Lengths and learned shares of the three that are cut from text."""
    made = {
        make: make(sources, 40, random.Random(1))
        for make in (workloads.uniform, workloads.heavy_tailed, workloads.long_prompt)
    }
    lengths = {make: [len(row["input_ids"]) for row in rows] for make, rows in made.items()}
    assert set(lengths[workloads.uniform]) == {512}
    assert workloads.facts(made[workloads.uniform], 4)["labelled"] == 511 / 512
    assert median(lengths[workloads.heavy_tailed]) == pytest.approx(110, rel=0.05)
    assert 600 < max(lengths[workloads.heavy_tailed]) <= 1300
    assert workloads.facts(made[workloads.long_prompt], 4)["labelled"] == pytest.approx(0.1, abs=0.002)
    assert min(lengths[workloads.long_prompt]) >= 400


# Systems


def test_our_first_epoch_reads_the_rows_in_their_order():
    """The loop shuffles; the rows are placed so that it undoes it."""
    rows = [{"input_ids": [i, i + 1], "trained": [0, 1]} for i in range(17)]
    placed = Rows(rows, seed=3)
    assert [placed[i].input_ids[0] for i in epoch_order(placed, 3, 0)] == list(range(17))
    assert placed.max_id == 17


def test_the_first_token_is_never_a_label():
    """Nothing predicts it, whatever the file says."""
    assert system.labels({"input_ids": [7, 8, 9], "trained": [1, 0, 1]}) == [-100, -100, 9]
