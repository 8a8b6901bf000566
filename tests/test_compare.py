"""`lora compare`: the same conditions for all, every number what it says, nothing lost when something stops."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from lora_cli.cli import app
from lora_cli.errors import ExitCode, UserError
from lora_cli.presets import with_defaults
from lora_cli.recipe import dump
from lora_cli.recipe.load import load
from lora_cli.run import compare_run
from lora_cli.run.compare import Plan, check_complete, compare, plan
from lora_cli.run.compare_plot import spread
from lora_cli.run.compare_report import bootstrap, columns, verdict
from lora_cli.run.evaluate import evaluate
from lora_cli.run.stop import Stop
from lora_cli.run.train import train
from lora_cli.screen import Screen

VARIANTS = "compare:\n  lora:\n  wide: {adapter.r: 6, train: {learning_rate: 2e-2}}\n"
GENERAL = "The sea is calm tonight.\nThe tide is full.\n\nBegin, and cease, and then again begin.\n"


@pytest.fixture
def recipe(tiny_folder: Path, rows_file: Path, tmp_path: Path):
    """Write a recipe on the tiny model and return its path; `more` stands below it."""
    (tmp_path / "general.txt").write_text(GENERAL)

    def write(more: str = VARIANTS, name: str = "r.yaml", **replaced: str) -> Path:
        text = (
            f"model: {{name: {tiny_folder}, dtype: float32}}\n"
            f"data:\n  train: {rows_file}\n  eval_fraction: 0.2\n"
            '  format: {prompt: "{question}", completion: "{answer}"}\n'
            "adapter: {r: 4}\n"
            "train: {max_steps: 4, batch_size: 8, learning_rate: 1e-2}\n"
            f"eval: {{metrics: [loss, exact_match], max_new_tokens: 4, forgetting: {tmp_path}/general.txt}}\n"
        )
        for old, new in replaced.items():
            text = re.sub(rf"\b{old}: [^,}}\n]*", f"{old}: {new}", text)
        (tmp_path / name).write_text(text + more)
        return tmp_path / name

    return write


class Pool:
    """Checks in this process what is otherwise checked in another one."""

    def __init__(self, *_: Any) -> None:
        self.map = map

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def drawn() -> bool:
    """Whether the picture is drawn; most tests save the second that it takes."""
    return False


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, drawn: bool) -> list[list[str]]:
    """The commands that runs consist of, as they come, done in this process because starting one takes seconds."""
    called: list[list[str]] = []

    def here(command: list[str], run: Any, stop: Stop, tick: Any) -> str:
        called.append(command)
        try:
            if command[0] == "train":
                train(load(Path(command[1]), (), Path(command[3])).recipe, Screen(), resume=True)
                tick()
                return ""
            only = "--adapter-only" in command
            return json.dumps(evaluate(Path(command[1]), None, [], Screen(), adapter_only=only))
        except UserError as error:
            raise compare_run.RunError(str(error)) from error

    if not drawn:
        monkeypatch.setattr("lora_cli.run.compare.picture", lambda *_: b"a second saved")
    monkeypatch.setattr(compare_run, "_lora", here)
    monkeypatch.setattr(compare_run, "ProcessPoolExecutor", Pool)
    return called


def made(path: Path, seeds: int = 2, **settings: Any) -> Plan:
    return plan([path], seeds=seeds, output=path.parent / "out", **settings)


def refusal(*paths: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        plan(paths, **settings)
    return str(caught.value).replace(f"{paths[0].parent}/", "")


# ---- what is measured ------------------------------------------------------------------------------------------


def test_every_number_is_what_it_says(recipe, commands, capsys):
    planned = made(recipe())
    report = compare(planned, Screen())
    assert report["finished"] == 4
    for variant in report["variants"]:
        assert [run["seed"] for run in variant["runs"]] == [0, 1]
        for run in variant["runs"]:
            folder = Path(run["folder"])
            again = evaluate(folder, None, [], Screen(), output=folder / "again.jsonl")
            assert (run["before"], run["after"]) == (again["base"], again["adapter"])
            assert run["forgetting"] == again["forgetting"] != 0
            tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
            assert run["trained_parameters"] == sum(tensor.numel() for tensor in tensors.values())
            lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            steps = [line for line in lines if "loss" in line]
            seconds = sorted(line["seconds"] for line in steps)
            assert run["seconds_per_step"] == pytest.approx((seconds[1] + seconds[2]) / 2)
            assert run["seconds"] == pytest.approx(sum(seconds))
            assert run["peak_memory_bytes"] == steps[-1]["memory_bytes"]
        losses = [run["after"]["loss"] for run in variant["runs"]]
        assert variant["summary"]["loss"]["mean"] == pytest.approx(sum(losses) / 2)
        assert variant["summary"]["loss"]["interval"] == pytest.approx(sorted(losses))
    shown = capsys.readouterr()
    assert "run 4/4  wide, seed 1  left" in shown.err
    assert shown.out == ""


def test_a_seed_gives_every_variant_the_same_rows_and_the_base_is_measured_once_for_it(recipe, commands):
    planned = made(recipe())
    compare(planned, Screen())
    read = {}
    for run in planned.runs:
        lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
        read[run.variant.name, run.seed] = [line["tokens"] for line in lines if "loss" in line]
    assert read["lora", 0] == read["wide", 0] != read["lora", 1] == read["wide", 1]
    measured = [command for command in commands if command[0] == "eval"]
    assert ["--adapter-only" in command for command in measured] == [False, True, False, True]
    first, second = (json.loads(run.beside("json").read_text()) for run in planned.runs[:2])
    assert first["before"] == second["before"]


def test_one_seed_claims_no_interval_and_without_a_text_nothing_is_said_of_forgetting(recipe, commands):
    path = recipe()
    path.write_text(re.sub(r", forgetting: [^}]*", "", path.read_text()))
    report = compare(made(path, seeds=1), Screen())
    summaries = [each["summary"] for each in report["variants"]]
    assert all(known["interval"] is None for each in summaries for known in each.values())
    assert "With one seed nothing says" in verdict(report)
    assert "forgetting" not in {column.key for column in columns(report)}
    assert "orgetting" not in (path.parent / "out" / "compare.md").read_text()


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6), st.floats(0.1, 3), st.floats(-3, 3))
def test_a_bootstrap_interval_is_seeded_lies_inside_the_data_and_follows_their_unit(values, factor, shift):
    low, high = bootstrap(values)
    assert bootstrap(values) == [low, high]
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    moved = bootstrap([factor * value + shift for value in values])
    assert moved == pytest.approx([factor * low + shift, factor * high + shift], abs=1e-9)


def test_a_bootstrap_interval_has_the_width_of_the_normal_one_for_many_values():
    values = [float(value % 10) for value in range(400)]
    low, high = bootstrap(values)
    assert high - low == pytest.approx(2 * 1.96 * 8.25**0.5 / 20, rel=0.1)
    assert bootstrap([1.0]) is None


# ---- what is written -------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What an HTML page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


@pytest.mark.parametrize("drawn", [True])
def test_the_files_parse_and_say_the_same(recipe, commands):
    report = compare(made(recipe()), Screen())
    out = Path(report["folder"])
    assert json.loads((out / "compare.json").read_text()) == report
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    page = Page((out / "compare.html").read_text())
    assert page.open == []
    assert [link[:15] for link in page.links] == ["data:image/png;"]
    table = [
        line.split("|")[1:-1] for line in (out / "compare.md").read_text().splitlines() if line[:1] == "|"
    ]
    assert len({len(row) for row in table}) == 1
    assert [row[0].strip() for row in table] == ["variant", "---", "base", "lora", "wide"]
    assert "adapter.r: 6, train.learning_rate: 0.02" in table[-1][1]
    loss = f"{report['variants'][0]['summary']['loss']['mean']:.4f}"
    assert loss in page.cells
    assert loss in table[3][2]
    assert not list(out.rglob(".tmp-*"))


@pytest.mark.parametrize("drawn", [True])
def test_names_of_recipes_cannot_break_the_page_or_the_picture(recipe, commands, tmp_path):
    paths = [recipe("", name) for name in ("<b>$a|b$.yaml", "&amp;.yaml")]
    report = compare(plan(paths, output=tmp_path / "out"), Screen())
    page = Page((tmp_path / "out" / "compare.html").read_text())
    assert {"<b>$a|b$", "&amp;"} <= set(page.cells)
    assert report["finished"] == 2


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_labels_are_moved_apart_in_their_order(heights):
    found = spread(sorted(heights), 0.05)
    assert all(high - low >= 0.049 for low, high in pairwise(found))
    assert found[0] >= 0


# ---- what fails, stops, and goes on ----------------------------------------------------------------------------


def test_a_failing_variant_is_shown_and_the_others_go_on(recipe, commands, capsys):
    path = recipe(VARIANTS + "  wild: {train.learning_rate: 1e30}\n")
    report = compare(made(path, seeds=1), Screen())
    wild = report["variants"][2]
    assert (report["finished"], report["failed"], wild["status"]) == (2, 1, "failed")
    assert "the loss is not a finite number" in wild["errors"][0]
    for name in ("compare.md", "compare.html"):
        assert "not a finite number" in (path.parent / "out" / name).read_text()
    assert "! wild, seed 0: failed" in capsys.readouterr().err
    with pytest.raises(UserError, match="1 of 3 runs failed") as caught:
        check_complete(report)
    assert caught.value.code is ExitCode.PARTLY
    commands.clear()
    compare(made(path, seeds=1), Screen())
    assert [command[3] for command in commands] == [str(path.parent / "out" / "wild" / "seed-0")]


def test_finished_runs_are_read_back_and_more_seeds_and_variants_join_them(recipe, commands):
    before = compare(made(recipe(), seeds=1), Screen())
    commands.clear()
    more = made(recipe(VARIANTS + "  narrow: {adapter.r: 2}\n"), seeds=2)
    after = compare(more, Screen())
    trained = {command[3].split("/out/")[1] for command in commands if command[0] == "train"}
    assert trained == {"lora/seed-1", "wide/seed-1", "narrow/seed-0", "narrow/seed-1"}
    assert after["finished"] == 6
    assert after["variants"][0]["runs"][0] == before["variants"][0]["runs"][0]


def test_other_recipes_in_the_folder_are_refused_before_anything_is_done(recipe, commands):
    compare(made(recipe(), seeds=1), Screen())
    commands.clear()
    with pytest.raises(UserError, match="other recipes") as caught:
        compare(made(recipe(learning_rate="3e-2"), seeds=1), Screen())
    assert caught.value.code is ExitCode.LOCKED
    assert commands == []


def test_a_comparison_that_was_refused_before_its_first_run_can_be_mended_in_place(recipe, commands):
    with pytest.raises(UserError, match="nowhere"):
        compare(
            made(recipe("compare:\n  a: {}\n  b: {adapter.target_modules: [nowhere]}\n"), seeds=1), Screen()
        )
    mended = recipe("compare:\n  a: {}\n  b: {adapter.target_modules: [q_proj]}\n")
    assert compare(made(mended, seeds=1), Screen())["finished"] == 2


def test_what_is_trained_was_written_down_at_the_start(recipe, commands, monkeypatch):
    path = recipe()
    planned = made(path, seeds=1)
    real = compare_run.checked

    def edited(*arguments: Any) -> dict[str, int]:
        recipe(max_steps="1000")
        return real(*arguments)

    monkeypatch.setattr("lora_cli.run.compare.checked", edited)
    assert compare(planned, Screen())["budget"] == "4 steps of 8"


def test_a_key_that_is_not_set_has_the_default_of_the_method(recipe, tmp_path):
    """Written out in full, r would be 16 for a method that wants 256."""
    path = recipe("compare: {vera: {adapter: {method: vera}}}\n")
    path.write_text(path.read_text().replace("adapter: {r: 4}\n", ""))
    (run,) = made(path, seeds=1).runs
    (tmp_path / "written.yaml").write_text(dump.to_yaml(run.recipe, only_set=True))
    assert with_defaults(load(tmp_path / "written.yaml").recipe.adapter).r == 256
    assert run.recipe.adapter.r == 16


def test_mistakes_in_the_settings_of_parts_are_told_with_their_line_before_training(recipe, commands):
    path = recipe("compare:\n  a: {}\n  b: {adapter.init: {pissa: {nitre: 3}}}\n")
    with pytest.raises(UserError) as caught:
        compare(made(path, seeds=1), Screen())
    assert str(caught.value).startswith(f"{path}:11: ")
    assert "nitre" in str(caught.value)
    assert commands == []


def test_a_key_that_one_variant_has_no_use_for_is_told_with_its_line_and_taken_back_by_null(recipe, commands):
    path = recipe("compare:\n  a: {}\n  b: {adapter.method: ia3}\n")
    with pytest.raises(
        UserError, match=rf"{path}:11: adapter.method: ia3.*variant 'b': .*adapter\.r \({path}:6\)"
    ):
        compare(made(path, seeds=1), Screen())
    path.write_text(path.read_text().replace("ia3", "ia3, adapter.r: null"))
    assert compare(made(path, seeds=1), Screen())["failed"] == 0


def lora(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lora_cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_a_comparison_that_is_stopped_goes_on_to_the_same_bytes(recipe, tmp_path):
    """With its real processes: Ctrl-C once, in the middle of the run."""
    path, out = recipe("compare: {lora: {}}\n", max_steps="40, save_steps: 5"), tmp_path / "out"
    command = ("compare", str(path), "--output", str(out), "--json")
    first = lora(*command)
    log = out / "lora" / "seed-0" / "log.jsonl"
    while first.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 2):
        time.sleep(0.02)
    first.send_signal(signal.SIGINT)
    stdout, stderr = first.communicate()
    assert first.returncode == ExitCode.INTERRUPTED, stderr
    assert "the same command goes on" in stderr
    assert stdout == ""
    done = len(log.read_text().splitlines())
    assert 2 < done < 40
    second = lora(*command)
    stdout, stderr = second.communicate()
    assert second.returncode == 0, stderr
    report = json.loads(stdout)
    assert report["finished"] == 1
    assert "going on after step" in (out / "lora" / "seed-0.log").read_text()
    whole = train(load(out / "lora" / "seed-0.yaml", (), tmp_path / "whole").recipe, Screen())
    weights = "adapter_model.safetensors"
    assert (whole / weights).read_bytes() == (out / "lora" / "seed-0" / "adapter" / weights).read_bytes()
    assert report["variants"][0]["summary"]["peak_memory_bytes"]["mean"] > 1e8


@pytest.mark.slow
def test_a_process_that_dies_is_a_failed_run_with_its_last_words(recipe, tmp_path):
    (run, *_) = made(recipe(), seeds=1).runs
    run.beside("log").parent.mkdir(parents=True)
    with pytest.raises(compare_run.RunError, match=r"nowhere\.yaml: no such file"):
        compare_run._lora(["train", "nowhere.yaml"], run, Stop(), lambda: None)
    log = run.beside("log")
    for code, said, told in [
        (-9, "x", "killed by SIGKILL, most likely for its memory"),
        (1, "Traceback (most recent call last):\n  File\nValueError: no", "ValueError: no"),
        (1, "", "exit code 1"),
        (4, "note\nerror: rows a:1: bad\n  → mend it\n", "rows a:1: bad\n  → mend it"),
    ]:
        log.write_text(said)
        assert compare_run._complaint(code, log, 0) == told


# ---- what may be compared --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "told"),
    [
        ("train.max_steps: 8", "budget is 64 examples and 32 examples"),
        ("train.epochs: 1", "budget is 1 epochs and 32 examples"),
        ("train.batch_size: 16", "budget is 64 examples"),
        ("data.train_on: all", "data.train_on is all and completion"),
        ("data.eval_fraction: 0.3", "data.eval_fraction is 0.3 and 0.2"),
        ("model.dtype: bfloat16", "model.dtype is bfloat16 and float32"),
        ("eval.metrics: [loss]", "eval.metrics is [loss] and [loss, exact_match]"),
        ("eval.forgetting: null", "eval.forgetting is null and"),
    ],
)
def test_other_conditions_are_refused_unless_allowed_and_then_said(recipe, variant, told):
    path = recipe(f"compare:\n  a:\n  b:\n    {variant}\n")
    message = refusal(path)
    assert f"r.yaml:12: 'b' and 'a' cannot be compared: {told}" in message
    assert "--unequal" in message
    key = re.match(r"(\S+) is", told)[1]
    assert plan([path], unequal=True).unequal == (key,)


def test_what_is_allowed_to_be_unequal_is_said_in_the_table(recipe, commands):
    path = recipe("compare:\n  a:\n  long: {train.max_steps: 6}\n")
    report = compare(made(path, seeds=1, unequal=True), Screen())
    text = (path.parent / "out" / "compare.md").read_text()
    assert "train.max_steps: 6" in text
    assert "not under the same conditions: they differ in budget" in text
    assert report["budget"] == "4 steps of 8 or 6 steps of 8"


def test_the_same_budget_in_other_steps_and_another_packing_are_compared(recipe):
    planned = plan(
        [recipe("compare:\n  a:\n  b: {train.max_steps: 8, train.batch_size: 4, data.packing: true}\n")]
    )
    assert planned.unequal == ()


def test_several_recipes_are_named_after_their_files(recipe, tmp_path):
    paths = [recipe("", "a.yaml"), recipe("", "b.yaml", r="8")]
    planned = plan(paths, ["train.seed=3"], seeds=2)
    assert [(variant.name, variant.settings) for variant in planned.variants] == [
        ("a", {}),
        ("b", {"adapter.r": "8"}),
    ]
    assert [(run.variant.name, run.seed) for run in planned.runs] == [("a", 3), ("b", 3), ("a", 4), ("b", 4)]
    assert planned.folder == Path("runs/a-compare")
    assert "'train.seed' is" not in refusal(recipe("", "c.yaml"), tmp_path / "none.yaml")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.yaml").write_text(paths[0].read_text())
    assert "two recipes are called 'a'" in refusal(paths[0], tmp_path / "more" / "a.yaml")
    assert "has variants of its own" in refusal(recipe(), paths[0])
    assert "a.yaml: nothing to compare" in refusal(paths[0])


# ---- the section of the recipe ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "line", "told"),
    [
        ("compare: 5", 9, "compare: expected a mapping"),
        ("compare: [a]", 9, "compare: expected a mapping"),
        ("compare:\n  a: 5", 10, "compare.a: expected a mapping of settings, got 5"),
        (
            "compare:\n  a:\n    adapter.rr: 5",
            11,
            "unknown key 'compare.a.adapter.rr'\n  → did you mean 'r'?",
        ),
        ("compare:\n  a:\n    adapter:\n      r: x", 12, "compare.a.adapter.r: expected a whole number ≥ 1"),
        ("compare:\n  a:\n    r: 5", 11, "'r' belongs under 'adapter'"),
        (
            "compare:\n  a:\n    adapter.method: doar",
            11,
            "compare.a.adapter.method: unknown method 'doar'\n  → did",
        ),
        ("compare:\n  a:\n    adapter.init: pisa", 11, "compare.a.adapter.init: unknown init 'pisa'"),
        ("compare:\n  a:\n    adapter.r: 5\n    adapter: {r: 6}", 12, "compare.a.adapter.r: duplicate key"),
        ("compare:\n  a:\n    adapter.r: 5\n    adapter.r: 6", 12, "compare.a.adapter.r: duplicate key"),
        ("compare:\n  a: {}\n  a: {}", 11, "compare.a: duplicate key, first at r.yaml:10"),
        ("compare:\n  a:\n    output: {dir: x}", 11, "compare.a.output: a variant cannot set this"),
        (
            "compare:\n  a:\n    train.seed: 5",
            11,
            "compare.a.train.seed: a variant cannot set this\n  → --seeds",
        ),
        ("compare:\n  a:\n    compare: {b: {}}", 11, "compare.a.compare: a variant cannot set this"),
        ("compare:\n  a b: {}", 10, "compare.a b: not a name of a variant"),
        ("compare:\n  ../a: {}", 10, "not a name of a variant"),
        ("compare:\n  a:\n    train.warmup_steps: 1\n    train.warmup_ratio: 0", 12, "exclude each other"),
        (
            "compare:\n  a:\n    train.min_learning_rate: 1",
            11,
            "compare.a.train: 'min_learning_rate' is above",
        ),
        (
            "compare:\n  a:\n    data.eval_fraction: 0\n    eval.samples: 3",
            12,
            "'eval.samples' needs held-out rows",
        ),
        ("compare:\n  a:\n    model.name: ${NOT_SET_ANYWHERE}", 11, "NOT_SET_ANYWHERE is not set"),
    ],
)
def test_every_mistake_in_the_section_is_told_with_its_line(recipe, section, line, told):
    message = refusal(recipe(section + "\n"))
    assert f"r.yaml:{line}: " in message
    assert told in message
    assert message.count("r.yaml:") == 1 + ("first at" in message)


def test_mistakes_of_all_variants_are_told_together_in_their_order(recipe):
    message = refusal(recipe("compare:\n  a: {adapter.r: 0}\n  b: {adapter.rr: 1}\n  c: {adapter.r: 3}\n"))
    assert re.findall(r"^r\.yaml:(\d+)", message, re.MULTILINE) == ["10", "11"]


def test_a_variant_is_the_recipe_with_its_keys_on_top(recipe):
    path = recipe("compare:\n  a: {adapter.alpha: 3, train: {epochs: 2}}\n  b:\n")
    loaded = load(path, ["adapter.dropout=0.5", "compare.b.adapter.r=7"])
    a, b = (loaded.variants[name].recipe for name in "ab")
    assert (a.adapter.alpha, a.adapter.r, a.train.epochs, a.train.max_steps) == (3, 4, 2, None)
    assert (b.adapter.r, b.train.max_steps) == (7, 4)
    assert a.adapter.dropout == b.adapter.dropout == loaded.recipe.adapter.dropout
    assert a.compare.variants == {}
    assert loaded.variants["a"].origin("adapter.alpha") == f"{path}:10"
    assert loaded.variants["a"].origin("adapter.r") == f"{path}:6"


def test_a_child_adds_variants_to_those_of_the_recipe_it_extends(recipe, tmp_path):
    recipe()
    (tmp_path / "child.yaml").write_text(
        "extends: r.yaml\ncompare: {wide: {adapter.alpha: 1}, third: {adapter.r: 3}}\n"
    )
    variants = load(tmp_path / "child.yaml").variants
    assert set(variants) == {"lora", "wide", "third"}
    assert (variants["wide"].recipe.adapter.r, variants["wide"].recipe.adapter.alpha) == (6, 1)


def test_a_recipe_with_variants_is_written_and_read_back(recipe, tmp_path):
    first = load(recipe())
    (tmp_path / "again.yaml").write_text(dump.to_yaml(first.recipe))
    again = load(tmp_path / "again.yaml")
    assert again.recipe == first.recipe
    assert {name: each.recipe.adapter for name, each in again.variants.items()} == {
        name: each.recipe.adapter for name, each in first.variants.items()
    }


def test_editors_complete_and_check_variants():
    checker = jsonschema.Draft202012Validator(json.loads(json.dumps(dump.json_schema())))
    base = {"model": {"name": "m"}, "data": {"train": "a"}}
    for right in (None, {}, {"adapter.r": 3}, {"adapter": {"r": 3}, "adapter.init.pissa.niter": 3}):
        assert checker.is_valid({**base, "compare": {"a": right}}), right
    for wrong in (
        5,
        {"adapter.r": 0},
        {"adapter.rr": 1},
        {"adapter": {"rr": 1}},
        {"r": 1},
        {"output.dir": "x"},
    ):
        assert not checker.is_valid({**base, "compare": {"a": wrong}}), wrong


# ---- the command -----------------------------------------------------------------------------------------------


def test_the_command_prints_json_and_fails_in_part(recipe, commands, tmp_path):
    from typer.testing import CliRunner

    path = recipe("compare:\n  a:\n  wild: {train.learning_rate: 1e30}\n")
    done = CliRunner().invoke(app, ["compare", str(path), "--output", str(tmp_path / "out"), "--json"])
    assert json.loads(done.stdout)["finished"] == 1
    assert isinstance(done.exception, UserError)
    assert done.exception.code is ExitCode.PARTLY


def test_planning_imports_nothing_heavy(recipe):
    code = (
        "import sys; from pathlib import Path; from lora_cli.run.compare import plan;"
        f"plan([Path({str(recipe())!r})]); print({{'torch', 'transformers', 'datasets'}} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
