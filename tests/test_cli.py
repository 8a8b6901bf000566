"""The command line: instant help, one message for a mistake, exit codes."""

import os
import subprocess
import sys

import pytest

from lora_cli import __version__
from lora_cli.errors import ExitCode

HEAVY = ("torch", "transformers", "accelerate", "datasets", "numpy", "safetensors")


def lora(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lora_cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    "arguments", [["--help"], ["methods"], ["methods", "lora"], ["--version"], ["train", "--help"]]
)
def test_light_commands_import_nothing_heavy(arguments):
    code = (
        "import sys\nsys.argv = ['lora', *sys.argv[1:]]\nfrom lora_cli.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print('heavy:', sorted(set({HEAVY}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "heavy: []", done.stderr


def test_the_commands_themselves_need_neither_pydantic_nor_yaml():
    code = "import sys, lora_cli.cli; print({'pydantic', 'yaml', 'torch'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_version_is_the_packages():
    assert lora("--version").stdout.strip() == f"lora {__version__}"


def test_a_users_mistake_is_one_message_and_an_exit_code():
    done = lora("train", "no-such-recipe.yaml")
    assert done.returncode == ExitCode.RECIPE
    assert "no-such-recipe.yaml" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_every_command_has_help_for_each_of_its_options():
    for command in (
        "train",
        "check",
        "estimate",
        "eval",
        "compare",
        "generate",
        "chat",
        "merge",
        "export",
        "methods",
        "init",
        "schema",
    ):
        done = lora(command, "--help", COLUMNS="200")
        assert done.returncode == 0
        lines = [line for line in done.stdout.splitlines() if line.lstrip("│ *").startswith("--")]
        assert all(len(line.strip("│ ").split("  ")) > 1 for line in lines), done.stdout


def test_colour_is_off_when_the_user_says_so():
    assert "\x1b[" not in lora("methods", "nothing-like-it", NO_COLOR="1", FORCE_COLOR="1").stderr.replace(
        "\x1b[0m", ""
    )
