"""A picture of a comparison of many variants: held-out loss and forgetting, every seed, the best mean on top.

python -m scripts.family_picture      scripts/bench/results/family.json -> family.png
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

FOUND = Path(__file__).parent / "bench" / "results" / "family.json"
PANELS = {"held-out loss": ("loss", "log"), "forgetting": ("forgetting", "symlog")}
TICKS = {"loss": (0.25, 0.3, 0.4, 0.5, 0.7, 1, 1.5), "forgetting": (0.05, 0.1, 0.2, 0.5, 1, 2, 5)}
BESIDE = {"lora": "C3", "lora_slower": "C1"}
"""What the others are to be seen beside -> colour."""


def main() -> None:
    """Draw it."""
    variants = json.loads(FOUND.read_text(encoding="utf-8"))["variants"]
    variants.sort(key=lambda variant: -variant["summary"]["loss"]["mean"])
    figure, axes = plt.subplots(1, len(PANELS), sharey=True, figsize=(9, 13), layout="constrained")
    for ax, (title, (key, scale)) in zip(axes, PANELS.items(), strict=True):
        for row, variant in enumerate(variants):
            found, color = variant["summary"][key], BESIDE.get(variant["name"], "C0")
            mean, seeds = found["mean"], found["values"]
            ax.plot(seeds, [row] * len(seeds), "o", color=color, alpha=0.35, markersize=4)
            ax.plot(mean, row, "o", color=color, markersize=6)
        ax.set_xscale(scale, **({"linthresh": 0.1} if scale == "symlog" else {}))
        ax.set_xticks(TICKS[key], [f"{tick:g}" for tick in TICKS[key]], fontsize=8)
        ax.minorticks_off()
        ax.set_title(title, loc="left", fontsize=10)
        ax.grid(axis="both", alpha=0.3, linewidth=0.5)
    axes[0].set_yticks(range(len(variants)), [variant["name"] for variant in variants], fontsize=7)
    axes[0].set_ylim(-1, len(variants))
    figure.savefig(FOUND.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    sys.exit(main())
