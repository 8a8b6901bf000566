"""loraprune: heads and channels of the MLPs are pruned while LoRA trains, by what its gradients say. arXiv:2305.18403

An entry of W counts |(W0 + s·B·A) ⊙ Ĝ|, where Ĝ = ∂B·A + B·∂A − ∂B·∂A is what a step of plain descent would take off
B·A: an estimate of W's gradient that no gradient of W is computed for. It is summed over what belongs together: the
rows of a head in q, k and v with its columns in o, or a channel's rows in gate and up with its column in down; of each
layer in proportion to its norm, and averaged over steps. Along a cubic more of them go, of every attention and MLP the
same share, and stay away. Where heads share their keys, all that share one go together.

What is saved is A, B and which rows stay (`delta: pruned`), for the base as it was. `lora merge` makes the pruned
weights of it: in their old shapes, with zeros for what is gone, so neither smaller nor faster until they are cut out.
There is no LoRA that does the same, so `lora export` refuses. Layers that are not adapted are not pruned:
`adapter.layers` spares blocks (the authors spare the first tenth and the last).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from lora_cli import parts
from lora_cli.adapter import budget
from lora_cli.adapter.base import Base
from lora_cli.adapter.delta import LowRank
from lora_cli.adapter.layer import Adapted
from lora_cli.adapter.lifecycle import Lifecycle, Run
from lora_cli.errors import ExitCode, UserError
from lora_cli.recipe.schema import Section

needs = {"delta.pruned": "there it is kept which rows stay"}
forbids = {
    "base.embedding": "it is in no attention and no MLP",
    "base.expert": "an expert is given some of the tokens only",
    "base.convolution": "it is in no attention and no MLP",
    "train.parallel": "every W would be gathered in every step, to be weighed",
}
WHERE = "adapter.lifecycle: loraprune"
SMALLEST = 1e-8
"""Beside the norm of a layer's scores, which is zero where it has no gradient."""


class Settings(Section):
    """Settings in a recipe: `{loraprune: {share: 0.5, begin: 0.1, end: 0.9}}`."""

    share: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.5, description="Of the heads of every attention and the channels of every MLP that go."
    )
    begin: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1, description="Share of all steps before the first of them goes."
    )
    end: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.9, description="Share of all steps after which the last of them has gone."
    )
    every: Annotated[int, Field(ge=1)] = Field(default=10, description="Steps between two prunings.")
    beta: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.9, description="How slowly importance is averaged."
    )

    def contradictions(self) -> Iterator[str]:
        """There have to be steps in which something goes."""
        if self.begin >= self.end:
            yield "'begin' is not before 'end'; lower it, or raise 'end'"


@dataclass(frozen=True)
class Unit:
    """An attention or an MLP: its adapted layers, and which head or channel each of their rows or columns is of."""

    count: int
    """Of its heads (those with keys of their own) or channels."""
    rows: dict[str, Tensor]
    """Layer that writes them -> number of each row [out]."""
    columns: dict[str, Tensor]
    """Layer that reads them -> number of each column [in]."""


class LoRAPrune(Lifecycle):
    """Averages importance until the last pruning; decides in some steps."""

    def __init__(self, share: float, begin: float, end: float, every: int, beta: float) -> None:
        """As in a recipe."""
        self.share, self.begin, self.end, self.every, self.beta = share, begin, end, every, beta
        self.importance: dict[str, Tensor] = {}
        """Attention or MLP -> averaged importance of its heads or channels."""

    def setup(self, run: Run) -> None:
        """Find what belongs together; nothing is important yet."""
        self.layers = run.adapter.layers
        self.units = units_of(run.adapter.model, self.layers)
        for name, unit in self.units.items():
            device = self._k(next(iter(unit.rows))).device
            self.importance[name] = torch.zeros(unit.count, device=device)

    @torch.no_grad()
    def gradients(self, run: Run) -> None:
        """Average, where the gradients are finite."""
        if run.step >= self._span(run)[1]:
            return
        for name, unit in self.units.items():
            now = self.scores(unit)
            if torch.isfinite(now).all():
                self.importance[name].lerp_(now, 1 - self.beta)

    def scores(self, unit: Unit) -> Tensor:
        """Importance of each head or channel in this step."""
        total: Tensor | float = 0.0
        for numbers, side in ((unit.rows, 1), (unit.columns, 0)):
            for name, number in numbers.items():
                delta = self.layers[name].delta
                assert isinstance(delta, LowRank)
                W = self.layers[name].base.weight() + delta.scale * (delta.B @ delta.A)
                entries = (W * estimated(delta)).abs().sum(side)
                found = entries.new_zeros(unit.count).index_add_(0, number.to(entries.device), entries)
                total = total + found / (torch.linalg.norm(found) + SMALLEST)
        assert isinstance(total, Tensor)
        return total

    @torch.no_grad()
    def stepped(self, run: Run) -> None:
        """Let the least important go; what is gone stays away."""
        begin, end = self._span(run)
        if run.step > end or (run.step < end and (run.step <= begin or (run.step - begin) % self.every)):
            return
        for name, unit in self.units.items():
            gone = int(self.share * unit.count * (1 - budget.left(run.step, begin, end)))
            scores = torch.where(self._stays(unit), self.importance[name], -1.0)
            stays = budget.largest(scores, unit.count - gone).float()
            for layer, number in unit.rows.items():
                self._k(layer).copy_(stays[number.to(stays.device)])

    def _span(self, run: Run) -> tuple[int, int]:
        """The step after which something goes, and that of the last pruning."""
        end = max(round(self.end * run.total_steps), 1)
        return min(round(self.begin * run.total_steps), end - 1), end

    def _stays(self, unit: Unit) -> Tensor:
        """Which heads or channels are there."""
        name, number = next(iter(unit.rows.items()))
        k = self._k(name)
        return torch.zeros(unit.count, device=k.device).index_copy_(0, number.to(k.device), k) > 0

    def _k(self, layer: str) -> Tensor:
        return self.layers[layer].delta.get_parameter("k")

    def state(self) -> dict[str, Tensor]:
        """The averages; which rows stay is a tensor of the adapter."""
        return self.importance

    def restore(self, state: dict[str, Tensor]) -> None:
        """Put them back."""
        for name, mean in self.importance.items():
            mean.copy_(state[name])


make = LoRAPrune


def estimated(delta: LowRank) -> Tensor:
    """Ĝ [out, in]: B·A − (B − ∂B)·(A − ∂A)."""
    A, B = delta.A, delta.B
    of_A, of_B = (torch.zeros_like(p) if p.grad is None else p.grad for p in (A, B))
    return of_B @ A + (B - of_B) @ of_A


# ---- what belongs together ----------------------------------------------------------------------------------------

OF_HEADS = {"q_proj": "q", "k_proj": "k", "v_proj": "k", "c_attn": "qkk", "qkv_proj": "qkk"}
"""Layer of an attention -> what its rows are, in order: of all heads (q), of those with keys of their own (k)."""
VALUES = ("v_proj", "c_attn", "qkv_proj")
"""With its values a head is gone; without its queries or keys alone it is not."""
READS_HEADS = ("o_proj", "c_proj", "out_proj")


def units_of(model: Any, layers: dict[str, Adapted]) -> dict[str, Unit]:
    """Name of an attention or MLP -> the unit; of those that adapted layers can take something from.

    Raises:
        UserError: there is none, or a layer is not as large as its name says.
    """
    found: dict[str, Unit] = {}
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in layers):
        inside = {last: name for name in layers for each, _, last in [name.rpartition(".")] if each == owner}
        if {*inside} & {*VALUES}:
            found[owner] = _attention(model.config.get_text_config(), layers, inside)
        elif not {*inside} & {*OF_HEADS} and (unit := _mlp(model.get_submodule(owner), inside)):
            found[owner] = unit
    if not found:
        what, fix = "no attention and no MLP of a known form is adapted", "see adapter.target_modules"
        raise UserError(what, where=WHERE, fix=fix, code=ExitCode.MODEL)
    return found


def _attention(config: Any, layers: dict[str, Adapted], inside: dict[str, str]) -> Unit:
    """One whose layers have known names."""
    heads = config.num_attention_heads
    count = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    queries = torch.arange(heads * width) // (width * heads // count)
    numbers = {"q": queries, "k": torch.arange(count * width) // width}
    rows = {
        name: torch.cat([numbers[piece] for piece in OF_HEADS[last]])
        for last, name in inside.items()
        if last in OF_HEADS
    }
    columns = {name: queries for last, name in inside.items() if last in READS_HEADS}
    wrong = [name for name, number in rows.items() if len(number) != layers[name].base.out_features]
    wrong += [name for name, number in columns.items() if len(number) != layers[name].base.in_features]
    if wrong:
        what, fix = f"{wrong[0]} is not as large as its heads", "leave it out with adapter.exclude_modules"
        raise UserError(what, where=WHERE, fix=fix, code=ExitCode.MODEL)
    return Unit(count, rows, columns)


def _mlp(module: nn.Module, inside: dict[str, str]) -> Unit | None:
    """One that has layers that widen, by their shapes, and one that narrows again; None where it has not."""
    bases = {last: base for last, child in module.named_children() if (base := _base(child)) is not None}
    narrow = {last: base for last, base in bases.items() if base.in_features > base.out_features}
    if len(narrow) != 1:
        return None
    ((reads, narrowing),) = narrow.items()
    channels = torch.arange(narrowing.in_features)
    rows = {
        name: channels.repeat(bases[last].out_features // len(channels))
        for last, name in inside.items()
        if last not in narrow
        and bases[last].in_features == narrowing.out_features
        and bases[last].out_features % len(channels) == 0
    }
    return Unit(len(channels), rows, {inside[reads]: channels} if reads in inside else {}) if rows else None


def _base(module: nn.Module) -> Base | None:
    """W0 of a layer, adapted or not; None of what is no layer."""
    if isinstance(module, Adapted):
        return module.base
    views = (parts.load("base", name) for name in parts.names("base"))
    return next((view.View(module) for view in views if isinstance(module, view.wraps)), None)
