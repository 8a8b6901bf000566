"""`lora init`: a few questions, or flags, and a commented recipe that loads."""

from pathlib import Path

import typer

from lora_cli import io_ops
from lora_cli.errors import UserError
from lora_cli.recipe.init import Answers, suggest, write
from lora_cli.recipe.load import load
from lora_cli.screen import Screen

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def init(output: Path, model: str | None, data: str | None, *, ask: bool, screen: Screen) -> None:
    """Write `output`, load it once to be sure, and say what comes next.

    Raises:
        UserError: `output` exists, or an answer does not fit into a recipe (nothing is left behind then).
    """
    if output.exists():
        raise UserError("already exists", where=str(output), fix="name another file: lora init other.yaml")
    model = model or (_ask("Model (folder or Hub id)", MODEL) if ask else MODEL)
    data = data or (
        _ask("Training rows (jsonl, csv, txt ...)", "data/train.jsonl") if ask else "data/train.jsonl"
    )
    io_ops.write_text(output, write(Answers(model=model, train=data, format=suggest(Path(data)))))
    try:
        load(output)
    except UserError:
        io_ops.remove(output)
        raise
    screen.note(f"wrote {output}")
    if not Path(data).exists():
        screen.warn(f"{data} is not there yet")
    screen.note(f"next: lora check {output}")


def _ask(question: str, default: str) -> str:
    return typer.prompt(question, default=default, err=True)
