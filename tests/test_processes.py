"""Several processes make the steps that one would make, and end together."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import typer
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from lora_cli.cli import app
from lora_cli.errors import ExitCode, UserError
from lora_cli.recipe.schema import Recipe
from lora_cli.run.train import train
from lora_cli.screen import Screen
from tests import tiny
from tests.bench import Bench, result, root_of
from tests.forking import ROOT, Forker, forker

EXACT = {"deterministic": True}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Nine rows, four a step: the last step of an epoch has one row, so that some processes have none."""
    return Bench(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def processes() -> Iterator[Forker]:
    with forker() as started:
        yield started


def together(processes: Forker, bench: Bench, recipe: Recipe, count: int, **how: Any) -> dict[str, Any]:
    """Train in several processes."""
    return processes.together(["train", str(bench.file(recipe)), "--resume"], count, **how)


def adapter_of(recipe: Recipe) -> dict[str, torch.Tensor]:
    return load_file(root_of(recipe) / "adapter" / "adapter_model.safetensors")


def log_of(recipe: Recipe) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root_of(recipe) / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("count", [2, 3])
def test_processes_that_add_up_in_order_give_the_bytes_of_one(bench, processes, count):
    """With dropout, accumulation, evaluations, and processes without a row in the last step of an epoch."""
    recipe = bench.recipe(train={**EXACT, "micro_batch_size": random.choice([1, 2, 3, "auto"])})
    alone = recipe.model_copy(update={"output": bench.recipe().output})
    train(alone, Screen())
    assert together(processes, bench, recipe, count)["codes"] == [0] * count
    assert result(recipe) == result(alone)


def test_balanced_experts_get_the_same_bytes_from_two_processes(bench, processes):
    """The loads are counted over all of them."""
    recipe = bench.recipe(
        adapter={"method": "malora", "lifecycle": {"load_balance": {"weight": 2.0}}}, train=EXACT
    )
    alone = recipe.model_copy(update={"output": bench.recipe().output})
    train(alone, Screen())
    assert together(processes, bench, recipe, 2)["codes"] == [0, 0]
    assert result(recipe) == result(alone)


DECIDES: dict[str, dict[str, Any]] = {
    "alora": {"rank": {"alora": {"rounds": 2, "rows": 3}}, "r": 4, "dropout": 0.2},
    "autolora": {"rank": {"autolora": {"search": 0.6}}, "dropout": 0.2},
    "aflora": {"lifecycle": {"aflora": {"every": 1, "begin": 0.0, "end": 0.9}}},
    "dora_dynamic": {"rank": {"dora_dynamic": {"every": 1, "end": 0.9}}},
    "lora_drop": {"lifecycle": {"lora_drop": {"after": 0.5, "threshold": 0.3}}},
    "bilora": {"dropout": 0.2},
    "hiddenkey": {"dropout": 0.2},
    "loraprune": {"lifecycle": {"loraprune": {"every": 1, "begin": 0.0}}, "dropout": 0.2},
    "prilora": {"rank": {"prilora": {"every": 2}}, "dropout": 0.2},
    "sparse_adapter": {"lifecycle": [{"sparse_adapter": {"after": 1}}]},
}
"""Methods that decide on the way, from what all processes have alike; with dropout where inputs are measured."""


@pytest.mark.parametrize("method", DECIDES)
def test_processes_decide_on_the_way_what_one_would(bench, processes, method):
    recipe = bench.recipe(adapter={"method": method, **DECIDES[method]}, train=EXACT)
    alone = recipe.model_copy(update={"output": bench.recipe().output})
    train(alone, Screen())
    assert together(processes, bench, recipe, 2)["codes"] == [0, 0]
    assert result(recipe) == result(alone)


def test_processes_learn_the_same_as_one_whatever_the_order_of_sums(bench, processes):
    recipe = bench.recipe(adapter={"dropout": 0.0}, train={"optimizer": "sgd", "micro_batch_size": "auto"})
    alone = recipe.model_copy(update={"output": bench.recipe().output})
    train(alone, Screen())
    assert together(processes, bench, recipe, 2)["codes"] == [0, 0]
    ours, theirs = adapter_of(recipe), adapter_of(alone)
    for name in theirs:
        assert (ours[name] - theirs[name]).norm() <= 1e-6 * theirs[name].norm().clamp_min(1e-3), name
    for mine, other in zip(log_of(recipe), log_of(alone), strict=True):
        key = "loss" if "loss" in mine else "eval_loss"
        assert mine[key] == pytest.approx(other[key], rel=1e-6)


def test_stopped_and_killed_runs_go_on_in_any_number_of_processes_to_the_same_bytes(bench, processes):
    recipe = bench.recipe(train={**EXACT, "epochs": 6, "save_steps": 1})
    alone = recipe.model_copy(update={"output": bench.recipe().output})
    train(alone, Screen())
    whole = together(processes, bench, bench.recipe(train=EXACT), 2)["seconds"]
    for count, number, which in (
        (2, signal.SIGTERM, random.choice([0, 1, None])),
        (1, signal.SIGTERM, None),
        (3, signal.SIGKILL, random.choice([0, 1, 2])),
    ):
        ended = together(
            processes, bench, recipe, count, after=random.uniform(0.5, 1) * whole, number=number, which=which
        )
        assert set(ended["codes"]) <= {0, ExitCode.INTERRUPTED, -signal.SIGKILL}, ended["said"]
        assert "Traceback" not in ended["said"]
    assert together(processes, bench, recipe, 2)["codes"] == [0, 0]
    assert result(recipe) == result(alone)


def test_a_process_that_is_killed_ends_the_others_with_a_message(bench, processes):
    recipe = bench.recipe(train={"epochs": 2000, "save_steps": 5})
    ended = together(processes, bench, recipe, 2, after=4.0, which=1)
    assert ended["codes"] == [ExitCode.INTERRUPTED, -signal.SIGKILL], ended["said"]
    assert ended["said"].count("error: ") == 1
    assert "another process of this run has ended" in ended["said"]
    assert "--resume" in ended["said"]


def test_what_all_processes_meet_is_said_once(bench, processes):
    recipe = bench.recipe(model={"name": str(bench.folder / "nowhere")})
    ended = processes.together(
        ["train", str(bench.file(recipe))], 2, after=2.5, number=signal.SIGTERM, which=1
    )
    assert ended["codes"] == [ExitCode.MODEL, -signal.SIGTERM]
    assert ended["said"].count("error: ") == 1


def test_rows_of_a_loss_that_is_no_number_are_named_whichever_process_had_them(bench, processes):
    model = tiny.model("llama", num_hidden_layers=1, hidden_size=16, intermediate_size=16)
    with torch.no_grad():
        model.get_input_embeddings().weight[tiny.tokenizer().convert_tokens_to_ids("3")] = torch.nan
    model.save_pretrained(bench.folder / "nan")
    tiny.tokenizer().save_pretrained(bench.folder / "nan")
    recipe = bench.recipe(
        model={"name": str(bench.folder / "nan")},
        data={"eval_fraction": 0.0},
        train={"batch_size": 12, "micro_batch_size": 1},
    )
    ended = together(processes, bench, recipe, 2, after=3.5, number=signal.SIGTERM, which=1)
    assert ended["codes"][0] == ExitCode.NON_FINITE, ended["said"]
    rows = (bench.folder / "rows.jsonl").read_text().splitlines()
    bad = {index + 1 for index, row in enumerate(rows) if "3" in row}
    named = re.search(r"rows (.*?)(?: and \d+ more)?: the", ended["said"])
    assert named
    assert {int(each.rpartition(":")[2]) for each in named[1].split(", ")} <= bad


def test_memory_that_is_short_in_one_process_changes_nothing_that_is_learned(bench, processes):
    """Each has two of a step's four rows at once, whether they are added up in order or not."""
    how, which = random.choice(
        [
            ({"micro_batch_size": "auto"}, random.choice([0, 1])),
            ({"micro_batch_size": 2, **EXACT}, random.choice([0, 1])),
        ]
    )
    recipe = bench.recipe(adapter={"dropout": 0.0}, train={"optimizer": "sgd", **how})
    alone = recipe.model_copy(update={"output": bench.recipe().output})
    train(alone, Screen())
    ended = together(processes, bench, recipe, 2, within=["short_of_memory", str(which)])
    assert ended["codes"] == [0, 0], ended["said"]
    assert any(line.get("out_of_memory") for line in log_of(recipe))
    ours, theirs = adapter_of(recipe), adapter_of(alone)
    for name in theirs:
        assert (ours[name] - theirs[name]).norm() <= 1e-6 * theirs[name].norm().clamp_min(1e-3), name


@pytest.mark.parametrize(("patience", "codes"), [("60", {0}), ("1", {ExitCode.INTERRUPTED})])
def test_processes_wait_for_one_that_tokenises_longer_than_a_collective_may_take(
    bench, processes, patience, codes
):
    """Five seconds instead of ten minutes. Waiting inside a collective is what ends the runs of others."""
    recipe = bench.recipe(train={"max_steps": 1, "epochs": None})
    ended = together(processes, bench, recipe, 2, within=["impatient", "5", "8", patience])
    assert codes <= {*ended["codes"]}, ended["said"]
    assert (codes == {0}) == ({*ended["codes"]} == {0})


def test_only_the_gradient_of_the_adapter_travels(bench, processes):
    recipe = bench.recipe(train={"eval_steps": 1000})
    ended = together(processes, bench, recipe, 2)
    trained = sum(tensor.numel() for tensor in adapter_of(recipe).values())
    sent = float(ended["said"].split("each process sent ")[1].split("B a step")[0].replace("K", "e3"))
    assert 4 * trained <= sent <= 4 * trained + 200


def test_one_option_starts_the_processes_and_hands_their_exit_code_on(bench):
    recipe = bench.recipe(train=EXACT)
    alone = recipe.model_copy(update={"output": bench.recipe().output})
    train(alone, Screen())
    command = [sys.executable, "-m", "lora_cli", "train", str(bench.file(recipe)), "--processes", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "2 processes" in ended.stderr
    assert result(recipe) == result(alone)
    again = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert again.returncode == ExitCode.LOCKED
    assert again.stderr.count("error: ") == 1


@pytest.mark.parametrize(
    ("options", "started", "reason"),
    [
        (["--nodes", "2", "--processes", "1"], None, "go together"),
        (["--rendezvous", "a:1", "--processes", "1"], None, "go together"),
        (["--nodes", "2", "--rendezvous", "a:1"], None, "how many processes"),
        (["--processes", "3"], "2", "a launcher has started 2 processes, not 3"),
    ],
)
def test_an_option_that_would_be_passed_over_is_refused(bench, monkeypatch, options, started, reason):
    if started is not None:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", started)
    recipe = bench.recipe()
    ended = CliRunner().invoke(app, ["train", str(bench.file(recipe)), *options])
    assert isinstance(ended.exception, UserError)
    assert reason in str(ended.exception)
    assert not root_of(recipe).exists()


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Two network namespaces with a cable between them: as far as sockets are concerned, two machines."""
    names = [f"lora{random.getrandbits(20)}{end}" for end in "ab"]
    ip = shutil.which("ip", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if ip is None:
        pytest.skip("needs `ip` of iproute2")
    steps = [
        *(f"netns add {name}" for name in names),
        f"link add {names[0]}v netns {names[0]} type veth peer name {names[1]}v netns {names[1]}",
        *(f"-n {name} addr add 10.9.0.{at}/24 dev {name}v" for at, name in enumerate(names, 1)),
        *(f"-n {name} link set {link} up" for name in names for link in ("lo", f"{name}v")),
    ]
    try:
        for step in steps:
            done = subprocess.run([ip, *step.split()], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                pytest.skip(f"network namespaces are not permitted here: {done.stderr.strip()}")
        yield [f"{ip} netns exec {name}" for name in names]
    finally:
        for name in names:
            subprocess.run([ip, "netns", "del", name], capture_output=True, check=False)


def test_two_machines_give_the_bytes_of_one_process(bench, machines):
    """The documented command, on each of them."""
    recipe = bench.recipe(train=EXACT)
    alone = recipe.model_copy(update={"output": bench.recipe().output})
    train(alone, Screen())
    command = f"{sys.executable} -m lora_cli train {bench.file(recipe)} --processes 1 --nodes 2"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    started = [
        subprocess.Popen(
            f"{machine} {command} --rendezvous 10.9.0.1:29500".split(),
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        for machine in machines
    ]
    said = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert sum("2 processes" in each for each in said) == 1
    assert result(recipe) == result(alone)


# ---- files for clusters ---------------------------------------------------------------------------------------------

CLUSTER = ROOT / "scripts" / "cluster"


def commands(text: str) -> list[list[str]]:
    """The words of each `lora train` in a shell script, its lines joined."""
    found = re.findall(r"lora train (.*?)(?:\|\||$)", text.replace("\\\n", " "), re.MULTILINE)
    return [re.sub(r'"[^"]*\$\([^)]*\)[^"]*"|"[^"]*"', "1", each).split() for each in found]


def test_cluster_files_parse_and_start_commands_that_there_are(tmp_path):
    slurm, sky = CLUSTER / "slurm.sh", yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    assert {*sky} <= {"name", "num_nodes", "resources", "envs", "workdir", "file_mounts", "setup", "run"}
    scripts = {"slurm": slurm.read_text(), "setup": sky["setup"], "run": sky["run"]}
    for name, text in scripts.items():
        (tmp_path / name).write_text(text)
        subprocess.run(["bash", "-n", str(tmp_path / name)], check=True)
    train_command = typer.main.get_command(app).commands["train"]
    for text in (scripts["slurm"], scripts["run"]):
        (words,) = commands(text)
        options = {option for parameter in train_command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options
        assert {"--processes", "--nodes", "--rendezvous", "--resume"} <= {*words}
