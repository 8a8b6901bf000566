"""`lora compare`: variants under one budget, each in processes of its own. Read `compare` first; the rest are details.

Nothing here imports torch: the plan is instant, and this process stays small beside those that train.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli import io_ops
from lora_cli.errors import ExitCode, UserError
from lora_cli.recipe.dump import explained, to_yaml
from lora_cli.recipe.load import Loaded, load
from lora_cli.recipe.schema import OutputRecipe, Recipe
from lora_cli.run.compare_page import page
from lora_cli.run.compare_plot import picture
from lora_cli.run.compare_report import markdown, show, summarised
from lora_cli.run.compare_run import checked, execute
from lora_cli.run.folder import RunFolder
from lora_cli.run.stop import stop_signals
from lora_cli.screen import Screen

MAY_DIFFER = ("data.packing", "eval.batch_size", "eval.samples")
"""Of the model, the data and the evaluation: these change how fast it goes, not what is learned or measured."""
LENGTH = ("max_steps", "epochs", "batch_size")


@dataclass(frozen=True)
class Variant:
    """One recipe among others."""

    name: str
    loaded: Loaded
    settings: dict[str, str]
    """What it sets otherwise than the recipe that all start from."""


@dataclass(frozen=True)
class Run:
    """One variant with one seed; everything of it lies below or beside `folder`."""

    variant: Variant
    seed: int
    folder: Path

    @property
    def recipe(self) -> Recipe:
        """What is trained; the folder is named on the command line."""
        recipe = self.variant.loaded.recipe
        train = recipe.train.model_copy(update={"seed": self.seed})
        return recipe.model_copy(update={"train": train, "output": OutputRecipe()})

    def beside(self, ending: str) -> Path:
        """`seed-0.yaml`, the recipe; `seed-0.json`, the result; `seed-0.log`, what its processes said."""
        return self.folder.with_name(f"{self.folder.name}.{ending}")


@dataclass(frozen=True)
class Plan:
    """Every run of a comparison, all variants with the first seed first."""

    name: str
    folder: Path
    variants: tuple[Variant, ...]
    runs: tuple[Run, ...]
    unequal: tuple[str, ...]
    """In what the variants differ that should be the same; empty unless it was allowed."""


def compare(plan: Plan, screen: Screen) -> dict[str, Any]:
    """Train and measure every variant with every seed; return the numbers, which are on disk after each run.

    Raises:
        UserError: what is wrong with a recipe before anything is trained, or somebody stopped the comparison.
    """
    with RunFolder(plan.folder).held():
        _keep_recipes(plan)
        left, found = _left_to_do(plan)
        trained = checked(plan.folder, left, screen)
        with screen.runs(len(plan.runs), len(found)) as shown, stop_signals() as stop:
            for run in left:
                found.append(execute(run, trained, found, shown, stop))
                _write(plan, found)
        report = _write(plan, found)
        show(report, screen)
        return report


def check_complete(report: dict[str, Any]) -> None:
    """Make failed runs the command's failure.

    Raises:
        UserError: there are some.
    """
    if report["failed"]:
        what = f"{report['failed']} of {report['runs']} runs failed; the others are measured"
        fix = "see above; the same command tries them again"
        raise UserError(what, where=report["folder"], fix=fix, code=ExitCode.PARTLY)


def plan(
    paths: Sequence[Path],
    overrides: Sequence[str] = (),
    *,
    seeds: int = 1,
    output: Path | None = None,
    unequal: bool = False,
) -> Plan:
    """What will be trained, and that it can be compared.

    Args:
        paths: several recipes, or one with a section `compare`.
        overrides: `key=value` on top of each recipe; what a variant sets itself stays.
        seeds: runs of each variant, with the recipe's seed, the next one ...
        output: folder of the comparison; default: runs/<name of the first recipe>-compare.
        unequal: allow other budgets, data or models; the report says so.

    Raises:
        UserError: a recipe is wrong, there is nothing to compare, or the variants cannot be compared.
    """
    recipes = [load(path, overrides) for path in paths]
    variants = tuple(_variants(recipes, paths))
    differences = list(_differences(variants))
    if differences and not unequal:
        raise UserError.several(error for _, error in differences)
    name = recipes[0].name
    folder = output or Path("runs") / f"{name}-compare"
    firsts = [(variant, variant.loaded.recipe.train.seed) for variant in variants]
    runs = tuple(
        Run(variant, first + number, folder / variant.name / f"seed-{first + number}")
        for number in range(seeds)
        for variant, first in firsts
    )
    return Plan(name, folder, variants, runs, tuple(dict.fromkeys(key for key, _ in differences)))


def _variants(recipes: Sequence[Loaded], paths: Sequence[Path]) -> Iterator[Variant]:
    if len(recipes) == 1 and not recipes[0].variants:
        fix = "give several recipes, or write variants into it: compare: {lora: {}, dora: {adapter.method: dora}}"
        raise UserError("nothing to compare", where=str(paths[0]), fix=fix)
    several = {recipe.name: recipe for recipe in recipes}
    for number, recipe in enumerate(recipes if len(recipes) > 1 else []):
        if recipe.variants:
            fix = "compare it alone, or take the section out"
            raise UserError(
                "has variants of its own, among other recipes", where=recipe.origin("compare"), fix=fix
            )
        if several[recipe.name] is not recipe:
            what = f"two recipes are called '{recipe.name}', and that is what variants are called by"
            raise UserError(what, where=str(paths[number]), fix="rename one of the files")
    first = recipes[0]
    for name, loaded in (first.variants or several).items():
        yield Variant(name, loaded, _settings(loaded, first))


def _settings(loaded: Loaded, first: Loaded) -> dict[str, str]:
    """Dotted key -> value where it differs from the first recipe's."""
    known = {key: value for key, value, _ in explained(first)}
    found = ((key, value) for key, value, _ in explained(loaded) if value != known.get(key))
    return {key: value for key, value in found if not key.startswith("output.")}


def _differences(variants: Sequence[Variant]) -> Iterator[tuple[str, UserError]]:
    """Where a variant is not under the same conditions as the first one: what, and the complaint."""
    first = variants[0]
    theirs = _conditions(first.loaded)
    for variant in variants[1:]:
        ours = _conditions(variant.loaded)
        for key in dict.fromkeys([*theirs, *ours]):
            value, other = ours.get(key, "not set"), theirs.get(key, "not set")
            if value != other:
                what = f"'{variant.name}' and '{first.name}' cannot be compared: {key} is {value} and {other}"
                fix = "make it the same, or allow it with --unequal; the report then says so"
                yield key, UserError(what, where=_place(key, variant.loaded, first.loaded), fix=fix)


def _conditions(loaded: Loaded) -> dict[str, str]:
    """What has to be the same."""
    told = {
        key: value
        for key, value, _ in explained(loaded)
        if key.startswith(("model.", "data.", "eval.")) and key not in MAY_DIFFER
    }
    train = loaded.recipe.train
    seen = train.max_steps and train.max_steps * train.batch_size
    budget = f"{seen:,} examples" if seen else f"{train.epochs or 1:g} epochs"
    return {**told, "budget": budget, "train.seed": str(train.seed)}


def _place(key: str, loaded: Loaded, first: Loaded) -> str:
    """Where a condition was written; of the budget, what of it is not the same."""
    if key != "budget":
        return loaded.origin(key)
    ours, theirs = loaded.recipe.train, first.recipe.train
    parts = [part for part in LENGTH if getattr(ours, part) != getattr(theirs, part)]
    return next(filter(None, (loaded.origin(f"train.{part}") for part in parts)), "")


def _keep_recipes(plan: Plan) -> None:
    """Write down what each run trains, so that editing a recipe meanwhile changes nothing.

    Raises:
        UserError: the folder holds runs of other recipes that have begun.
    """
    begun = [run for run in plan.runs if run.folder.exists() or run.beside("json").exists()]
    for run in begun:
        path = run.beside("yaml")
        if not path.exists() or path.read_text(encoding="utf-8") != _recipe_text(run):
            what = "a comparison of other recipes is here"
            fix = "name another folder with --output, or remove this one"
            raise UserError(what, where=str(path), fix=fix, code=ExitCode.LOCKED)
    for run in plan.runs:
        if run not in begun:
            io_ops.write_text(run.beside("yaml"), _recipe_text(run))


def _recipe_text(run: Run) -> str:
    return to_yaml(run.recipe, only_set=True)


def _left_to_do(plan: Plan) -> tuple[list[Run], list[dict[str, Any]]]:
    """Runs without a result, and the results of the others."""
    left = [run for run in plan.runs if not run.beside("json").exists()]
    done = [run.beside("json") for run in plan.runs if run not in left]
    return left, [json.loads(path.read_text(encoding="utf-8")) for path in done]


def _write(plan: Plan, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """compare.json, .md, .png and .html, as far as the comparison has come."""
    report = summarised(plan, found)
    drawn = picture(plan, report)
    io_ops.write_json(plan.folder / "compare.json", report)
    io_ops.write_text(plan.folder / "compare.md", markdown(report))
    io_ops.write_bytes(plan.folder / "compare.png", drawn)
    io_ops.write_text(plan.folder / "compare.html", page(report, drawn))
    return report
