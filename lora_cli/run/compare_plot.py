"""The picture of a comparison: how the loss fell, and below it what came out, one panel a question."""

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lora_cli.run.compare_report import Column, columns, facts, share
from lora_cli.run.curve import smoothed
from lora_cli.run.folder import RunFolder

if TYPE_CHECKING:
    from lora_cli.run.compare import Plan

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#4d4d4d")
"""Okabe and Ito's, which people with any colour vision tell apart; dashes tell a second round of them."""
DASHES, MARKERS = ("-", "--", ":", "-."), "oDs^"
INK, PALE, GRID = "#222222", "#767676", "#e6e6e6"
ROW = 0.38
"""Inches of a variant in the lower panels."""
EDGE = 0.95
"""Share of the width; curves that end before it are not complete."""
WIDE = 10
"""Above this ratio of the first losses to the last ones the axis is logarithmic."""

Points = list[tuple[int, float]]


def colour(number: int) -> str:
    """Of the variant with this number."""
    return COLOURS[number % len(COLOURS)]


def _round(number: int, kinds: Sequence[str]) -> str:
    """Of dashes or markers: another one for each round of colours."""
    return kinds[number // len(COLOURS) % len(kinds)]


def picture(plan: "Plan", made: dict[str, Any]) -> bytes:
    """The PNG."""
    panels = list(_panels(made))
    height = ROW * len(made["variants"]) + 0.9
    figure = Figure(figsize=(11, 4.2 + height), dpi=160, layout="constrained", facecolor="white")
    grid = figure.add_gridspec(2, max(len(panels), 1), height_ratios=(4.2, height), wspace=0.07)
    top = figure.add_subplot(grid[0, :])
    curves = list(_curves(plan))
    _draw_curves(top, curves, plan)
    for index, (column, note, draw) in enumerate(panels):
        axes = figure.add_subplot(grid[1, index])
        _dress(axes, TITLES.get(column.key, column.title), note, made, first=index == 0)
        draw(axes, column, made)
    figure.supxlabel(" · ".join(facts(made)), x=0.01, ha="left", fontsize=8.5, color=PALE, parse_math=False)
    canvas = FigureCanvasAgg(figure)
    figure.draw_without_rendering()  # the layout is known from here on
    _name_curves(top, curves)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


# The curves


def _curves(plan: "Plan") -> Iterator[tuple[int, str, list[Points]]]:
    """Number and name of each variant with the smoothed losses of its runs."""
    for number, variant in enumerate(plan.variants):
        folders = [run.folder for run in plan.runs if run.variant is variant]
        losses = [smoothed(points) for folder in folders if (points := _losses(folder))]
        if losses:
            yield number, variant.name, losses


def _losses(folder: Path) -> Points:
    return [(line["step"], line["loss"]) for line in RunFolder(folder).lines() if "loss" in line]


def _draw_curves(axes: Axes, curves: Sequence[tuple[int, str, list[Points]]], plan: "Plan") -> None:
    """The mean over the seeds as a line, from the lowest to the highest as a band."""
    for number, _, runs in curves:
        style: dict[str, Any] = {"color": colour(number), "linestyle": _round(number, DASHES)}
        steps, means, low, high = zip(*_together(runs), strict=True)
        axes.fill_between(steps, low, high, color=colour(number), alpha=0.13, linewidth=0)
        axes.plot(steps, means, linewidth=1.8, solid_capstyle="round", **style)
    axes.set_title("Training loss", loc="left", fontsize=12, color=INK, fontweight="bold")
    band = "; band: lowest to highest seed" if len({run.seed for run in plan.runs}) > 1 else ""
    axes.set_title(f"nats per trained token, smoothed{band}", loc="right", fontsize=9, color=PALE)
    axes.set_xlabel("optimizer step", fontsize=9, color=PALE)
    _spare(axes, "both")
    means = [point[1] for _, _, runs in curves for point in _together(runs)]
    if means and min(means) > 0 and max(means) / min(means) > WIDE:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.01)


def _together(runs: list[Points]) -> list[tuple[int, float, float, float]]:
    """Step, mean, lowest and highest, at the steps that every run has reached."""
    found: list[tuple[int, float, float, float]] = []
    for points in zip(*runs, strict=False):
        values = [loss for _, loss in points]
        found.append((points[0][0], sum(values) / len(values), min(values), max(values)))
    return found


def _name_curves(axes: Axes, curves: Sequence[tuple[int, str, list[Points]]]) -> None:
    """Each name at the end of its line; at the right edge moved apart where they would cover one another."""
    ends: list[tuple[float, float, int, str]] = []
    for number, name, runs in curves:
        step, mean, _, _ = _together(runs)[-1]
        x, y = axes.transAxes.inverted().transform(axes.transData.transform((step, mean)))
        if x < EDGE:  # failed, or not finished yet
            axes.plot([step], [mean], "x", color=colour(number), markersize=7, markeredgewidth=2)
            axes.annotate(name, (step, mean), (8, 0), textcoords="offset points", **_label(number))
        else:
            ends.append((float(y), float(x), number, name))
    ends.sort()
    gap = min(13 / (axes.get_window_extent().height * 72 / axes.figure.dpi), 1 / max(len(ends), 1))
    heights = spread([end[0] for end in ends], gap)
    for (y, x, number, name), height in zip(ends, heights, strict=True):
        axes.annotate(
            name,
            (x, y),
            (1.03, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            arrowprops={"arrowstyle": "-", "color": colour(number), "linewidth": 0.7, "relpos": (0, 0.5)},
            **_label(number),
        )


def _label(number: int) -> dict[str, Any]:
    return {
        "color": colour(number),
        "fontsize": 9.5,
        "fontweight": "bold",
        "va": "center",
        "annotation_clip": False,
        "parse_math": False,
    }


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Sorted heights ≥ 0, neighbours pushed apart until `gap` lies between them."""
    found = list(heights)
    for _ in range(1000):
        for low in range(len(found) - 1):
            lack = gap - (found[low + 1] - found[low])
            if lack > 0:
                found[low] = max(found[low] - lack / 2, 0)
                found[low + 1] = max(found[low + 1] + lack / 2, found[low])
    return found


# The panels below

Draw = Callable[[Axes, Column, dict[str, Any]], None]

SCORES = 2
"""Panels for what is scored on held-out rows."""
TITLES = {
    "loss": "Held-out loss",
    "choice_accuracy": "Accuracy",
    "exact_match": "Exact match",
    "forgetting": "Forgetting",
    "peak_memory_bytes": "Peak memory",
    "seconds_per_step": "Seconds per step",
}


def _panels(made: dict[str, Any]) -> Iterator[tuple[Column, str, Draw]]:
    """What is shown, a word on it, and how it is drawn."""
    known = [column for column in columns(made) if column.key != "perplexity"]  # the loss in another unit
    scores = [column for column in known if column.best and column.key != "forgetting"][:SCORES]
    for column in (*scores, *(column for column in known if column.key == "forgetting")):
        better = "lower is better" if column.best is min else "higher is better"
        before = made["base"].get(column.key)
        yield column, f"{better}; base {column.shown(before['mean'])}" if before else better, _dots
    for column in known:
        if column.key in ("peak_memory_bytes", "seconds_per_step"):
            yield column, "", _bars


def _dress(axes: Axes, title: str, note: str, made: dict[str, Any], *, first: bool) -> None:
    names = [variant["name"] for variant in made["variants"]]
    axes.set_title(title, loc="left", fontsize=10.5, color=INK, fontweight="bold")
    axes.set_xlabel(note or " ", fontsize=8.5, color=PALE)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), names if first else [""] * len(names))
    _spare(axes, "x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", labelsize=9.5, length=0)
    for number, label in enumerate(axes.get_yticklabels()):
        label.set_parse_math(False)
        label.set_color(colour(number))
        label.set_fontweight("bold")


def _spare(axes: Axes, grid: Literal["both", "x"]) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5, colors=PALE, length=0)


def _dots(axes: Axes, column: Column, made: dict[str, Any]) -> None:
    """The mean with its number, its interval, and each seed."""
    for number, variant in enumerate(made["variants"]):
        known = variant["summary"].get(column.key)
        if known is None:
            where = axes.get_yaxis_transform()
            axes.text(0.02, number, variant["status"], transform=where, color=PALE, fontsize=8.5, va="center")
            continue
        style: dict[str, Any] = {"color": colour(number), "clip_on": False}
        if known["interval"]:
            axes.plot(
                known["interval"], [number] * 2, linewidth=2.4, alpha=0.5, solid_capstyle="butt", **style
            )
            axes.plot(
                known["values"], [number] * len(known["values"]), "o", markersize=3.5, alpha=0.5, **style
            )
        axes.plot([known["mean"]], [number], _round(number, MARKERS), markersize=7.5, **style)
        text = column.shown(known["mean"])
        place: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "bottom"}
        place["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # above grid and zero line
        axes.annotate(text, (known["mean"], number), (0, 5), fontsize=8, color=INK, **place)
    if column.key == "forgetting":
        axes.axvline(0, color=PALE, linewidth=1, zorder=0)
    axes.margins(x=0.2)
    axes.xaxis.set_major_locator(MaxNLocator(3))
    if column.shown is share:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))


def _bars(axes: Axes, column: Column, made: dict[str, Any]) -> None:
    """From zero, with the number behind."""
    for number, variant in enumerate(made["variants"]):
        known = variant["summary"].get(column.key)
        if known is not None:
            axes.barh(number, known["mean"], height=0.42, color=colour(number), alpha=0.85)
            place: dict[str, Any] = {"textcoords": "offset points", "va": "center"}
            text = column.shown(known["mean"])
            axes.annotate(text, (known["mean"], number), (4, 0), fontsize=8.5, color=INK, **place)
    axes.set_xlim(0, axes.get_xlim()[1] * 1.35)
    axes.set_xticks([])
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
