"""What a comparison found, as one JSON object and in words: a sentence, a table, how to read it."""

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_cli import __version__
from lora_cli.screen import Screen, duration, size

if TYPE_CHECKING:
    from lora_cli.run.compare import Plan

RESAMPLES = 2000
FEW = 5
"""Below so many seeds a bootstrap interval is too narrow to be called one of 95 % without a word."""


@dataclass(frozen=True)
class Column:
    """A number that every run has."""

    key: str
    title: str
    shown: Callable[[float], str]
    best: Callable[..., Any] | None = None
    """`min` or `max` of what is learned; costs are for the reader to weigh."""


def share(value: float) -> str:
    """Of one, in percent."""
    return f"{100 * value:.1f} %"


def _bytes(count: float) -> str:
    return size(count, 1024, (" B", " KB", " MB", " GB", " TB"))


COLUMNS = (
    Column("loss", "held-out loss", "{:.4f}".format, min),
    Column("perplexity", "perplexity", "{:.4g}".format, min),
    Column("choice_accuracy", "accuracy", share, max),
    Column("exact_match", "exact match", share, max),
    Column("bleu", "BLEU", "{:.1f}".format, max),
    Column("chrf", "chrF", "{:.1f}".format, max),
    Column("forgetting", "forgetting", "{:+.3f}".format, min),
    Column("trained_parameters", "trained", size),
    Column("adapter_bytes", "adapter", _bytes),
    Column("peak_memory_bytes", "peak memory", _bytes),
    Column("seconds_per_step", "s / step", "{:.3g}".format),
    Column("seconds", "training time", duration),
)


def summarised(plan: "Plan", found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All numbers as one JSON object."""
    first = plan.variants[0].loaded.recipe
    finished = [each for each in found if each["status"] == "finished"]
    bases = {each["base_key"]: each["before"] for each in finished}
    same = set(plan.unequal) <= {"budget", "train.seed"}
    return {
        "name": plan.name,
        "folder": str(plan.folder),
        "version": __version__,
        "model": first.model.name,
        "data": [source.path for source in first.data.train],
        "seeds": sorted({run.seed for run in plan.runs}),
        "metric": first.eval.metrics[0],
        "unequal": list(plan.unequal),
        "runs": len(plan.runs),
        "finished": len(finished),
        "failed": len(found) - len(finished),
        "rows": finished[0]["rows"] if finished else None,
        "budget": " or ".join(
            dict.fromkeys(f"{each['steps']:,} steps of {each['batch_size']}" for each in finished)
        ),
        "base": summary(list(bases.values())) if same else {},
        "variants": [
            _variant(
                variant.name, variant.settings, [each for each in found if each["variant"] == variant.name]
            )
            for variant in plan.variants
        ],
    }


def _variant(name: str, settings: dict[str, str], found: list[dict[str, Any]]) -> dict[str, Any]:
    found = sorted(found, key=lambda each: each["seed"])
    finished = [each for each in found if each["status"] == "finished"]
    errors = list(dict.fromkeys(each["error"] for each in found if each["status"] == "failed"))
    status = (
        ("partly failed" if finished else "failed") if errors else ("finished" if finished else "waiting")
    )
    return {
        "name": name,
        "settings": settings,
        "status": status,
        "errors": errors,
        "summary": summary([{**each, **each["after"]} for each in finished]),
        "runs": found,
    }


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Column -> mean over the seeds, and its 95 % interval where there are several."""
    numbers = {
        each.key: [one[each.key] for one in found if one.get(each.key) is not None] for each in COLUMNS
    }
    return {
        key: {"mean": statistics.fmean(values), "interval": bootstrap(values), "values": values}
        for key, values in numbers.items()
        if values
    }


def bootstrap(values: Sequence[float], seed: int = 0) -> list[float] | None:
    """95 % interval of the mean by the percentiles of resampled means; None for a single value."""
    if len(values) < 2:
        return None
    draw = random.Random(seed)
    means = sorted(statistics.fmean(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return [means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES) - 1]]


# In words


def columns(made: dict[str, Any]) -> list[Column]:
    """Those that some variant has a number for."""
    known = {key for variant in made["variants"] for key in variant["summary"]}
    return [column for column in COLUMNS if column.key in known]


def cell(column: Column, numbers: dict[str, Any], wide: bool = True) -> str:
    """The mean, with the interval of what is learned if `wide`; empty where nothing is known."""
    known = numbers.get(column.key)
    if known is None:
        return ""
    text = column.shown(known["mean"])
    if column.best is None or known["interval"] is None or not wide:
        return text
    low, high = map(column.shown, known["interval"])
    return f"{text} ({low} to {high})"


def best(column: Column, made: dict[str, Any]) -> str | None:
    """The variant with the best mean, when there are several to choose from."""
    known = {
        each["name"]: each["summary"][column.key]["mean"]
        for each in made["variants"]
        if column.key in each["summary"]
    }
    return column.best(known, key=known.__getitem__) if column.best and len(known) > 1 else None


def settings(variant: dict[str, Any]) -> str:
    """What a variant sets otherwise, as one would write it."""
    return ", ".join(f"{key}: {value}" for key, value in variant["settings"].items()) or "as it stands"


Cells = list[str]


def rows(
    made: dict[str, Any], with_interval: Sequence[str] | None = None
) -> Iterator[tuple[str, str, Cells, list[bool]]]:
    """Name, settings, the cells, and whether each is the best of its column.

    Args:
        made: the report.
        with_interval: keys of the columns whose intervals are shown; default: all.
    """
    shown = columns(made)
    wide = {each.key for each in shown} if with_interval is None else set(with_interval)
    if made["base"]:
        cells = [cell(each, made["base"], each.key in wide) for each in shown]
        yield "base", "before training", cells, [False] * len(shown)
    for variant in made["variants"]:
        told = settings(variant)
        if variant["status"] != "finished":
            told += f"; {variant['status']}"
        cells = [cell(each, variant["summary"], each.key in wide) for each in shown]
        yield variant["name"], told, cells, [best(each, made) == variant["name"] for each in shown]


def verdict(made: dict[str, Any]) -> str:
    """What can be said, and no more."""
    column = next((each for each in columns(made) if each.key == made["metric"]), None)
    if column is None or column.best is None:
        return "Nothing is measured yet."
    known = [each for each in made["variants"] if column.key in each["summary"]]
    known.sort(key=lambda each: each["summary"][column.key]["mean"], reverse=column.best is max)
    first, *others = known
    word = "lowest" if column.best is min else "highest"
    if not others:
        return f"{first['name']}: {column.title} {cell(column, first['summary'])}."
    second = others[0]
    text = (
        f"{first['name']} has the {word} {column.title}, {cell(column, first['summary'])}; "
        f"next is {second['name']} with {cell(column, second['summary'])}."
    )
    return f"{text} {_certainty(first['summary'][column.key], second['summary'][column.key])}"


def _certainty(first: dict[str, Any], second: dict[str, Any]) -> str:
    if first["interval"] is None or second["interval"] is None:
        return "With one seed nothing says how much of the difference is chance."
    (low, high), (other_low, other_high) = first["interval"], second["interval"]
    if low <= other_high and other_low <= high:
        return "Their intervals overlap: these seeds do not tell the two apart."
    seeds = len(first["values"])
    return f"Their intervals do not overlap{f', but {seeds} seeds are few' if seeds < FEW else ''}."


def title(made: dict[str, Any]) -> str:
    """What was compared."""
    return f"{made['name']}: {len(made['variants'])} variants compared"


def facts(made: dict[str, Any]) -> list[str]:
    """On what the numbers rest."""
    seeds = made["seeds"]
    differ = {key.rpartition(".")[0] or key for key in made["unequal"]}
    return [
        made["model"] if "model" not in differ else "several models",
        ", ".join(made["data"]) if not any(key.startswith("data") for key in differ) else "several data sets",
        made["budget"] or "nothing finished yet",
        f"{len(seeds)} seeds, {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"seed {seeds[0]}",
        *([f"measured on {made['rows']:,} held-out rows"] if made["rows"] else []),
    ]


def notes(made: dict[str, Any]) -> list[str]:
    """How to read the table."""
    found: list[str] = []
    done = made["finished"] + made["failed"]
    if done < made["runs"]:
        found.append(f"{done} of {made['runs']} runs are done.")
    for variant in made["variants"]:
        found += [f"{variant['name']} {variant['status']}: {error}" for error in variant["errors"][:1]]
    if made["unequal"]:
        found.append(
            f"The variants are not under the same conditions: they differ in {', '.join(made['unequal'])}."
        )
    if len(made["seeds"]) > 1:
        few = ", which comes out too narrow with so few seeds" if len(made["seeds"]) < FEW else ""
        found.append(f"Beside a mean: its 95 % bootstrap interval over the seeds{few}.")
    if made["finished"] > 1:
        found.append("Bold: the best mean; whether it is more than chance is another question.")
    if any(column.key == "forgetting" for column in columns(made)):
        found.append(
            "Forgetting: loss on general text, after less before, in nats per token; less is better."
        )
    found.append("Peak memory: of the GPU if there is one, else of the whole process. s / step: the median.")
    return found


def markdown(made: dict[str, Any]) -> str:
    """compare.md: the sentence, the table, and how to read it."""
    head = ["variant", "what it sets", *(column.title for column in columns(made))]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    for name, told, cells, winners in rows(made):
        marked = [f"**{text}**" if wins else text for text, wins in zip(cells, winners, strict=True)]
        lines.append("| " + " | ".join(_escaped(text) for text in (name, told, *marked)) + " |")
    parts = [f"# {title(made)}", verdict(made), "\n".join(lines), " · ".join(facts(made))]
    return "\n\n".join([*parts, "\n".join(f"- {_escaped(note)}" for note in notes(made))]) + "\n"


def _escaped(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def show(made: dict[str, Any], screen: Screen) -> None:
    """The table on the screen, and where the rest is."""
    screen.heading(verdict(made))
    screen.table(
        ["variant", *(column.title for column in columns(made))],
        [(name, *cells) for name, _, cells, _ in rows(made, [made["metric"]])],
    )
    for note in notes(made):
        screen.note(note)
    screen.note(f"look at {made['folder']}/compare.html")
