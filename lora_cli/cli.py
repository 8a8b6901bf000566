"""The commands. Bodies are a few lines; everything heavy is imported inside them, so that --help is instant."""

import os
import signal
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lora_cli import __version__
from lora_cli.errors import AloneError, ExitCode, UserError
from lora_cli.screen import Screen

app = typer.Typer(
    name="lora",
    help="Fine-tune language models with LoRA from one YAML recipe.",
    epilog="Start with:  lora init → lora check recipe.yaml → lora train recipe.yaml → lora eval runs/recipe",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


RANK = "RANK"
"""Number of this process among those that a launcher has started; set by all launchers."""
PATIENCE = 3
"""Seconds after which the first process has told what all of them have met."""
TYPERS_CTRL_C = 130
"""What typer makes of a KeyboardInterrupt."""
SMALLER = "take less at once: train.micro_batch_size: 1, eval.batch_size, data.max_length, or gradient_checkpointing"


class Weights(StrEnum):
    """Those that were trained with, dequantised, or those on disk."""

    trained = "trained"
    original = "original"


class Dtype(StrEnum):
    """How numbers are stored."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Format(StrEnum):
    """Formats that adapters are exported to."""

    peft = "peft"


RecipePath = Annotated[
    Path, typer.Argument(help="The recipe, a YAML file. `lora init` writes one.", metavar="RECIPE")
]
AdapterPath = Annotated[
    Path, typer.Argument(help="Adapter folder (ours or PEFT's) or run folder.", metavar="ADAPTER")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Override one key, such as --set adapter.r=8. Repeatable.", metavar="KEY=VALUE"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
NewFolder = Annotated[
    Path, typer.Option("--output", "-o", help="Folder to make; must not exist.", metavar="DIR")
]
BaseModel = Annotated[
    str | None,
    typer.Option("--base", help="Base model, when it is not where the adapter says.", metavar="MODEL"),
]
OtherRecipe = Annotated[
    Path | None,
    typer.Option(
        "--recipe", help="Recipe with data and metrics; default: the one the adapter was trained with."
    ),
]


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run folder; default: runs/<name of the recipe>.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run in the output folder; starts it if there is none."),
    ] = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-change",
            help="With --resume: let this key of the recipe, or the files it names, be others than at the start, "
            "such as train.epochs or data.train. Repeatable.",
            metavar="KEY",
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            help="Processes on this machine that share the rows of each step: one a GPU, or a few on a CPU.",
            min=1,
            metavar="N",
        ),
    ] = None,
    nodes: Annotated[
        int, typer.Option(help="Machines, each of which starts this same command.", min=1, metavar="N")
    ] = 1,
    rendezvous: Annotated[
        str | None,
        typer.Option(help="Where the machines meet: a port of one of them.", metavar="HOST:PORT"),
    ] = None,
) -> None:
    """Fine-tune a model as the recipe says and save the adapter.

    Ctrl-C stops after the step under way and saves everything; --resume then goes on exactly where it stopped.
    Under torchrun or accelerate launch (-m lora_cli train ...) --processes is theirs to say.
    """
    from lora_cli.recipe.load import check_parts, load, placing

    loaded = load(recipe, overrides or [], output)
    check_parts(loaded)
    if _is_to_launch(processes, nodes, rendezvous):
        from lora_cli.run.launch import launch

        launch(sys.argv[1:], processes or 1, nodes, rendezvous or "localhost:0")
        return
    from lora_cli.run.train import train

    with placing(loaded):
        train(loaded.recipe, Screen(), resume, allow_change or [])


def _is_to_launch(processes: int | None, nodes: int, rendezvous: str | None) -> bool:
    """Whether this command is to start the processes, and is none of them.

    Raises:
        UserError: an option would be read and passed over.
    """
    if (nodes > 1) != (rendezvous is not None):
        what, fix = "--nodes and --rendezvous go together", "--nodes 2 --rendezvous first-machine:29500"
        raise UserError(what, fix=fix)
    if processes is None:
        if nodes > 1:
            raise UserError("how many processes on each machine?", where="--nodes", fix="add --processes N")
        return False
    started = os.environ.get("WORLD_SIZE", "1")
    if RANK in os.environ and int(started) != processes * nodes:
        what = f"a launcher has started {started} processes, not {processes * nodes}"
        raise UserError(what, where="--processes", fix="leave it to the launcher")
    return RANK not in os.environ


@app.command()
def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(help="Examples to show, trained tokens marked ⟦so⟧.", min=0)] = 2,
    as_json: AsJson = False,
) -> None:
    """Validate a recipe and show what it would do: settings, adapted layers, data. Nothing is trained."""
    from lora_cli.recipe.load import check_parts, load, placing

    loaded = load(recipe, overrides or [])
    check_parts(loaded)
    from lora_cli.run.check import check

    screen = Screen()
    with placing(loaded):
        screen.result(check(loaded, screen, rows), as_json)


@app.command()
def estimate(
    recipe: RecipePath,
    overrides: Overrides = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="H100, H200, A100, 4090, L4, or cpu; default: what this machine would train on.",
            metavar="NAME",
        ),
    ] = None,
    gpus: Annotated[
        int, typer.Option("--gpus", help="Devices that share the rows of a step.", min=1, metavar="N")
    ] = 1,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine first, for a few seconds.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Predict memory and time of a recipe, and what would make it fit. No weights are read, nothing is trained.

    The model's folder may hold config.json alone. Peaks are those of one process; a token's cost is counted by
    rehearsing a step on tensors without numbers.
    """
    from lora_cli.recipe.load import check_parts, load, placing

    check_parts(loaded := load(recipe, overrides or []))
    from lora_cli.run.estimate import estimate

    screen = Screen()
    with placing(loaded):
        screen.result(estimate(loaded, screen, device=device, gpus=gpus, measure=calibrate), as_json)


@app.command(name="eval")
def evaluate(
    path: Annotated[
        Path, typer.Argument(help="Adapter folder, run folder, or model.", metavar="ADAPTER|MODEL")
    ],
    recipe: OtherRecipe = None,
    overrides: Overrides = None,
    base: BaseModel = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where predictions.jsonl goes; default: the run folder."),
    ] = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="Leave the base out, when its numbers are known.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure base and adapter side by side on the same held-out rows; writes predictions.jsonl."""
    from lora_cli.run.evaluate import evaluate

    screen = Screen()
    report = evaluate(
        path, recipe, overrides or [], screen, base=base, output=output, adapter_only=adapter_only
    )
    screen.result(report, as_json)


@app.command()
def compare(
    recipes: Annotated[
        list[Path],
        typer.Argument(help="Several recipes, or one with a section `compare`.", metavar="RECIPE..."),
    ],
    overrides: Overrides = None,
    seeds: Annotated[
        int, typer.Option(help="Runs of each variant, with seeds one after another.", min=1)
    ] = 1,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the comparison; default: runs/<name>-compare."),
    ] = None,
    unequal: Annotated[
        bool, typer.Option("--unequal", help="Allow other budgets, data or models; the table says so.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train variants under one budget and measure them alike: a table, a picture, and a page.

    Stopped or failed, the same command goes on; --output DIR holds compare.html, .md, .png and .json.
    """
    from lora_cli.run.compare import check_complete, compare, plan

    planned, screen = plan(recipes, overrides or [], seeds=seeds, output=output, unequal=unequal), Screen()
    report = compare(planned, screen)
    screen.result(report, as_json)
    check_complete(report)


@app.command()
def generate(
    adapter: AdapterPath,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="What to answer.")] = None,
    rows: Annotated[
        Path | None, typer.Option("--input", "-i", help="Rows to answer, one JSON object a line.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Show the base's answers beside the adapter's.")
    ] = False,
    base: BaseModel = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.", min=1)] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy and repeatable.", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Answer one prompt, as it is generated, or a file of them."""
    from lora_cli.run.generate import Generation, generate

    asked = Generation(prompt, rows, compare, max_new_tokens, temperature, seed)
    generate(adapter, asked, Screen(), base=base, as_json=as_json)


@app.command()
def chat(
    adapters: Annotated[
        list[Path], typer.Argument(help="Adapters of one base, or a model.", metavar="ADAPTER...")
    ],
    base: BaseModel = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy and repeatable.", min=0.0)] = 0.0,
) -> None:
    """Talk to a model; switch between adapters and the bare base while it runs."""
    from lora_cli.run.chat import chat

    chat(adapters, Screen(), base=base, max_new_tokens=max_new_tokens, temperature=temperature)


@app.command()
def merge(
    adapter: AdapterPath,
    output: NewFolder,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Type of the merged weights; default: the base's own.")
    ] = None,
    base: BaseModel = None,
    onto: Annotated[
        Weights, typer.Option(help="Of an adapter that was trained on a quantised base: onto which weights.")
    ] = Weights.trained,
    as_json: AsJson = False,
) -> None:
    """Write a plain model with the adapter in its weights, and prove that it computes the same."""
    from lora_cli.run.merge import merge

    screen = Screen()
    screen.result(merge(adapter, output, dtype and dtype.value, screen, base=base, onto=onto.value), as_json)


@app.command()
def export(
    adapter: AdapterPath,
    output: NewFolder,
    format: Annotated[Format, typer.Option("--format", help="What to write.")] = Format.peft,
    r: Annotated[
        int | None,
        typer.Option("--r", help="Cut an adapter that dylora has trained to this rank.", min=1),
    ] = None,
    base: BaseModel = None,
    as_json: AsJson = False,
) -> None:
    """Write an adapter for other tools: PEFT, transformers, vLLM ..."""
    from lora_cli.run.export import export

    screen = Screen()
    screen.result(export(adapter, format.value, output, screen, base=base, r=r), as_json)


@app.command()
def methods(
    name: Annotated[
        str | None, typer.Argument(help="One method or part, explained.", metavar="[NAME]")
    ] = None,
) -> None:
    """List the methods and the parts they are made of, or explain one."""
    from lora_cli.run.methods import explain, listing

    listing(Screen(stderr=False)) if name is None else explain(name, Screen(stderr=False))


@app.command()
def init(
    output: Annotated[Path, typer.Argument(help="The recipe to write.", metavar="[RECIPE]")] = Path(
        "recipe.yaml"
    ),
    model: Annotated[str | None, typer.Option(help="Folder or Hub id of the model.")] = None,
    data: Annotated[str | None, typer.Option(help="Training rows: jsonl, csv, txt ...")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing; take flags and defaults.")] = False,
) -> None:
    """Write a short, commented recipe: asks a few questions, or takes flags."""
    from lora_cli.run.init import init

    init(output, model, data, ask=not yes and sys.stdin.isatty(), screen=Screen())


@app.command()
def schema() -> None:
    """Print the recipe's JSON schema, so that editors complete and check recipes."""
    from lora_cli.recipe.dump import json_schema

    Screen().result(json_schema(), as_json=True)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lora {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fine-tune language models with LoRA from one YAML recipe."""


def main() -> None:
    """Run the command; a user's mistake is one message and an exit code, never a traceback."""
    # OpenMP's threads spin while they wait for one another, by default for a millisecond: when another program takes
    # a core, all of them burn their time doing that. With a short spin a training step on two cores, one of them
    # busy, takes 5.9 s instead of more than 8.5 s, and 2.8 s instead of 2.7 s to 3.0 s when both are free.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    asked: list[int] = []

    def stop(number: int, frame: object) -> None:
        asked.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)  # clean up and say so, as for Ctrl-C
    if (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):  # shells let what is in the background ignore it
        signal.signal(signal.SIGINT, stop)
    # Nothing is told to anybody, and no service is asked to convert a model that has pickles alone.
    os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "DISABLE_SAFETENSORS_CONVERSION": "1"}
    try:
        app()
    except (Exception, SystemExit) as error:
        sys.exit(_told(error, bool(asked)))


def _told(error: Exception | SystemExit, stopped: bool) -> int | str | None:
    """Say what ended the command; returns the exit code.

    Raises:
        Exception: nobody has asked to stop, and it is none of those that are meant for users.
    """
    if isinstance(error, UserError) and (not stopped or error.code is ExitCode.INTERRUPTED):
        _tell(str(error), waits=isinstance(error, AloneError))
        return error.code
    if isinstance(error, SystemExit) and error.code != TYPERS_CTRL_C:
        return error.code
    if stopped or isinstance(error, SystemExit):  # whatever a library made of it, such as a failed import
        _tell("stopped")
        return ExitCode.INTERRUPTED
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        _tell(f"out of memory\n  → {SMALLER}")
        return ExitCode.OUT_OF_MEMORY
    raise error


def _tell(error: str, waits: bool = False) -> None:
    """Show what went wrong, once: of several processes that met the same the first one does.

    The others wait for it, and are ended when it has; so does one that only knows that another is gone.
    """
    follows = int(os.environ.get(RANK, "0")) > 0
    if follows or waits:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(PATIENCE)
    Screen().error(error)
