"""README says what is true now."""

import re
from pathlib import Path

import pytest

from lora_cli import parts
from lora_cli.cli import app
from lora_cli.errors import ExitCode
from lora_cli.recipe.load import load
from scripts import readme

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_generated_tables_are_current():
    assert readme.filled(TEXT) == TEXT


def test_every_part_stands_in_the_table_of_what_was_checked():
    table = TEXT[TEXT.index("## Conformance") :]
    for axis in parts.AXES:
        for name in parts.names(axis):
            row = re.search(rf"^\| `{axis}\.{name}` \|(.*)", table, re.MULTILINE)
            assert row is not None, f"{axis}.{name}: run python -m scripts.conformance"
            assert re.search(r"[1-9]", row[1]), f"{axis}.{name} was never checked"


def test_the_recipe_in_it_loads(tmp_path):
    recipe = re.search(r"```yaml\n(model:.*?)```", TEXT, re.DOTALL)
    assert recipe is not None
    (tmp_path / "recipe.yaml").write_text(recipe[1])
    load(tmp_path / "recipe.yaml")


def test_every_command_in_it_exists_and_every_command_is_in_it():
    named = set(re.findall(r"^lora (\w+)", TEXT, re.MULTILINE))
    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert named == known


def test_files_and_tests_that_it_names_exist():
    named = set(re.findall(r"`((?:tests|scripts|lora_cli|recipes)/[\w./]+)`|\((recipes/[\w.]+)\)", TEXT))
    assert all((ROOT / (a or b)).exists() for a, b in named), named
    assert len(named) > 10


@pytest.mark.parametrize("code", list(ExitCode))
def test_every_exit_code_is_listed(code):
    listed = TEXT[TEXT.index("Exit codes:") :].partition("\n\n")[0]
    assert re.search(rf"\b{code.value} ", listed), code
