"""Presets: a paper's name -> the parts it is made of. An axis named in the recipe wins over the preset."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from lora_cli import parts
from lora_cli.errors import UserError
from lora_cli.parts import Part

if TYPE_CHECKING:
    from lora_cli.recipe.schema import AdapterRecipe


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One method: what it is called in the literature, and how it differs from plain LoRA."""

    title: str
    paper: str
    when: str
    """When to use it, for `lora methods NAME`."""
    parts: Mapping[str, Part] = field(default_factory=dict[str, Part])


PRESETS: dict[str, Preset] = {
    "lora": Preset(
        title="LoRA: W = W0 + (alpha/r)·B·A, A random, B zero",
        paper="arXiv:2106.09685",
        when="The default. Start here; r 8 to 64 on all linear layers, learning rate 1e-4 to 1e-3.",
    ),
    "rslora": Preset(
        title="Rank-stabilised LoRA: LoRA with s = alpha/√r",
        paper="arXiv:2312.03732",
        when="With r of 32 and more, where plain LoRA's alpha/r holds a large rank back. At the same alpha its "
        "steps are √r times LoRA's: lower alpha or the learning rate when you switch.",
        parts={"scale": Part(name="rslora")},
    ),
    "lora_fa": Preset(
        title="LoRA-FA: LoRA with A frozen at its random start",
        paper="arXiv:2308.03303",
        when="When activations, not weights, fill the memory: half the trainable numbers, and the inputs of the "
        "adapted layers need not be kept for the backward pass. Often wants twice the rank.",
        parts={"trainable": Part(name="lora_fa")},
    ),
    "init_b": Preset(
        title="LoRA started from the other side: A zero, B random",
        paper="arXiv:2406.08447",
        when="To compare starts. The paper recommends the default start over this one.",
        parts={"init": Part(name="zero_a")},
    ),
}


@dataclass(frozen=True, kw_only=True)
class Method:
    """The parts of a method, one an axis."""

    name: str
    delta: Part = Part(name="lowrank")
    combine: Part = Part(name="add")
    init: Part = Part(name="kaiming")
    scale: Part = Part(name="alpha_over_r")
    trainable: Part = Part(name="all")
    dropout: Part = Part(name="standard")

    def chosen(self) -> dict[str, Part]:
        """Axis -> part."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "name"}


def resolve(adapter: "AdapterRecipe") -> Method:
    """The preset's parts with the recipe's own on top.

    Raises:
        UserError: there is no such method.
    """
    if adapter.method not in PRESETS:
        fix = parts.did_you_mean(adapter.method, PRESETS)
        raise UserError(f"unknown method '{adapter.method}'", where="adapter.method", fix=fix)
    own = {axis: getattr(adapter, axis) for axis in ("delta", "combine", "init", "scale", "trainable")}
    chosen = {axis: part for axis, part in own.items() if part is not None}
    return Method(
        name=adapter.method, **{**PRESETS[adapter.method].parts, **chosen, "dropout": adapter.dropout}
    )
