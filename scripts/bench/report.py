"""What the benchmark found, as a table and a picture."""

import io
from typing import Any

import ratios
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from ratios import OURS

COLOURS = {OURS: "#0072b2", "a": "#cc79a7", "b": "#d55e00", "c": "#009e73"}
"""Okabe and Ito's, which people with any colour vision tell apart."""
PEAK = "peak_rss_bytes"
PALE, GRID = "#767676", "#e6e6e6"


def table(found: dict[str, Any]) -> str:
    """Markdown: a line a workload, a column a peer, each ratio with its extremes."""
    peers = [name for name in found["systems"] if name != OURS]
    named = [f"speed vs {found['systems'][name]}" for name in peers]
    head = ["workload", "padding", "labelled", "tokens/s", "of the limit", *named]
    head += [f"{kind} vs {found['systems'][name]}" for kind in ("peak memory", "first step") for name in "bc"]
    lines = [head, ["---"] * len(head)]
    lines += [_line(name, each, peers) for name, each in found["workloads"].items()]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", *_notes(found), ""])


def _line(name: str, workload: dict[str, Any], peers: list[str]) -> list[str]:
    facts, speeds = workload["facts"], speeds_of(workload)
    ours = ratios.summary(speeds[OURS])["median"] if OURS in speeds else None
    limit = workload["limit"]["tokens_per_second"]
    cells = [f"{name}: {workload['title']}", f"{facts['padding']:.2f}", f"{facts['labelled']:.2f}"]
    cells += ["", ""] if ours is None else [f"{ours:.0f}", f"{ours / limit:.0%}"]
    cells += [_cell(ratio(workload, peer, "speed")) for peer in peers]
    return cells + [_cell(ratio(workload, peer, kind)) for kind in (PEAK, "first_step_s") for peer in "bc"]


def _cell(value: dict[str, float] | None) -> str:
    if value is None:
        return ""
    return f"**{value['median']:.2f}** ({value['min']:.2f} to {value['max']:.2f}, n={value['count']})"


def _notes(found: dict[str, Any]) -> list[str]:
    """Below the table."""
    notes = [
        f"{found['device']}; {found['model']}; "
        + ", ".join(f"{k} {v}" for k, v in found["versions"]["b"].items())
    ]
    for name, workload in found["workloads"].items():
        notes.append(f"{name}: " + "; ".join(_about(workload)))
    if "help_s" in found:
        notes.append(f"`lora --help`: {found['help_s']:.3f} s")
    if "parity" in found:
        parity = found["parity"]
        apart = ", ".join(f"{name} step {value:.1e}" for name, value in parity["relative"].items())
        notes.append(f"loss against the lean loop over {parity['steps']} steps, relative: {apart}")
    return [f"- {note}" for note in notes]


def _about(workload: dict[str, Any]) -> list[str]:
    """What is needed to believe the ratios of a workload."""
    noise, rate = noise_of(workload), workload["limit"]["flops_per_second"] / 1e9
    cpu = {peer: value for peer in "abc" if (value := ratio(workload, peer, "cpu_speed"))}
    itself = f"against itself {noise['min']:.3f} to {noise['max']:.3f}" if noise else "not run against itself"
    shown = ", ".join(f"{peer} {value['median']:.2f}" for peer, value in cpu.items())
    left_out = sum(len(rounds_of(workload, peer)) - len(pairs_of(workload, peer)) for peer in "abc")
    return [
        itself,
        f"limit at {rate:.0f} GFLOP/s",
        f"speed in CPU time vs {shown or '-'}",
        f"{left_out} pairs left out of times because the machine was not steady",
    ]


Pairs = list[tuple[dict[str, Any], dict[str, Any]]]
"""(ours, theirs) of some rounds."""


def ratio(workload: dict[str, Any], peer: str, kind: str) -> dict[str, float] | None:
    """Ours over theirs, summed up. How much memory a run takes does not hang on how fast the machine was."""
    pairs = (rounds_of if kind == PEAK else pairs_of)(workload, peer)
    return ratios.compared(pairs, workload["timed"])[kind] if pairs else None


def pairs_of(workload: dict[str, Any], peer: str) -> Pairs:
    """Every round in which both ran and the machine was steady."""
    return [pair for pair in rounds_of(workload, peer) if ratios.is_steady(pair)]


def rounds_of(workload: dict[str, Any], peer: str) -> Pairs:
    """Every round in which both ran."""
    rounds = [{run["system"]: run for run in each} for each in workload["rounds"]]
    return [(runs[OURS], runs[peer]) for runs in rounds if OURS in runs and peer in runs]


def speeds_of(workload: dict[str, Any]) -> dict[str, list[float]]:
    """System -> tokens per second of each of its runs."""
    speeds: dict[str, list[float]] = {}
    for run in (run for each in workload["rounds"] for run in each):
        speeds.setdefault(run["system"], []).append(ratios.speed(run, workload["timed"]))
    return speeds


def noise_of(workload: dict[str, Any]) -> dict[str, float] | None:
    """The ratio of this tool to itself, both ways round: a claim has to be outside of it."""
    pairs = [(each[0], each[1]) for each in workload["noise"] if len(each) == 2]
    pairs = [pair for pair in pairs if ratios.is_steady(pair)]
    both = pairs + [(second, first) for first, second in pairs]
    return ratios.compared(both, workload["timed"])["speed"] if both else None


def picture(found: dict[str, Any]) -> bytes:
    """The PNG: each system's speed as a share of what the matrix products alone would allow."""
    shown = {name: each for name, each in found["workloads"].items() if each["rounds"]}
    figure = Figure(figsize=(9, 1.2 + 1.3 * max(len(shown), 1)), dpi=160, layout="constrained")
    axes = figure.subplots()
    for place, workload in enumerate(shown.values()):
        _draw(axes, place, workload, found["systems"])
    axes.set_yticks(range(len(shown)), [f"{name}\n{each['title']}" for name, each in shown.items()])
    axes.set_ylim(max(len(shown), 1) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_xlabel("tokens per second, % of the limit that the machine's matrix products set", color=PALE)
    axes.set_title(found["device"], loc="right", fontsize=9, color=PALE)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _draw(axes: Any, place: int, workload: dict[str, Any], systems: dict[str, str]) -> None:
    """A bar a system, from the slowest to the fastest run as a line, with its speed behind."""
    speeds = speeds_of(workload)
    limit = workload["limit"]["tokens_per_second"]
    for number, name in enumerate(systems):
        if name not in speeds:
            continue
        known, height = ratios.summary(speeds[name]), place + (number - 1.5) * 0.2
        share = {key: 100 * known[key] / limit for key in ("median", "min", "max")}
        axes.barh(height, share["median"], height=0.17, color=COLOURS[name])
        axes.plot([share["min"], share["max"]], [height] * 2, color="black", linewidth=0.8)
        label = f"{systems[name]}: {known['median']:.0f} tokens/s"
        place_of = {"textcoords": "offset points", "va": "center", "fontsize": 8}
        axes.annotate(label, (share["max"], height), (5, 0), **place_of)
