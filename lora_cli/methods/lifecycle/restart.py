"""restart: every so many steps W takes ΔW in and a fresh ΔW starts, so that the rank grows. arXiv:2307.05695

Train, merge, start again: serial LoRA, ReLoRA, COLA (arXiv:2401.04151), XGBLoRA (arXiv:2410.19694), and with the
right start of the frozen factor Flora (arXiv:2402.03293) and GaLore (arXiv:2403.03507). W is kept in float32 beside
the base, which stays as it is; what is saved is exact factors while these are smaller than W, else W.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lora_cli import parts
from lora_cli.adapter.delta import LowRank
from lora_cli.adapter.lifecycle import Lifecycle, Run
from lora_cli.adapter.seed import generator_of
from lora_cli.adapter.start import Start
from lora_cli.recipe.schema import Section

Moments = Annotated[float, Field(ge=0, le=1)] | Literal["carry"]


def needs(every: int, moments: Moments, **_: object) -> dict[str, str]:
    """What its settings ask for."""
    found = {"a mergeable delta": "every restart adds ΔW to W"}
    if every == 1:
        found |= {ONE_STEP: "beside a factor that is zero in every step the other one never learns"}
    if moments == "carry":
        found |= {
            "delta.lowrank": "to be carried, a moment goes through one A and into the next",
            "trainable.lora_fa": "B's moment is one of W only while A stays",
        }
    return found


def forbids(moments: Moments, **_: object) -> dict[str, str]:
    """What never goes with it, and what its settings rule out."""
    found = {
        "combine.dora": "its lengths are those of W0 + ΔW, and W0 would change under them",
        "base.quantized": "every restart would quantise W anew, and lose what was learned",
        "train.parallel": "each process would keep a whole W of every layer, in float32",
        "lora_bias": "the bias of B would be lost at every restart",
        "rank.adalora": "a rank controller decides over a whole run, not over the piece between two restarts",
        "delta.vera": "all layers share one A and B, which cannot start anew",
        "delta.whole": "there is nothing that could be merged",
    }
    return found | ({"optimizer.sgd": "it has no moments that could be kept"} if moments else {})


ONE_STEP = (
    "trainable.lora_fa or trainable.only_a or delta.two_sided or delta.additive or delta.miss"
    " or a start that stands for a part of W0"
)
"""With one of these, everything that trains learns in a single step."""


class Settings(Section):
    """Settings in a recipe: `{restart: {every: 100}}`."""

    every: Annotated[int, Field(ge=1)] = Field(
        default=100, description="Optimizer steps from start to start."
    )
    moments: Moments = Field(
        default=0.0,
        description="Share of Adam's moments that is kept at a restart (0: it starts anew, 1: all); carry: the first "
        "moment is taken along into the new projection.",
    )
    warmup: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Steps over which the learning rate rises again after a restart."
    )
    layers: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="Only so many layers, drawn by lot at every start, learn until the next; default: all.",
    )


class Restart(Lifecycle):
    """Counts steps; everything random follows from (seed, step)."""

    def __init__(self, every: int, moments: float | str, warmup: int, layers: int | None) -> None:
        """As in a recipe."""
        self.every, self.moments, self.warmup, self.layers = every, moments, warmup, layers

    def setup(self, run: Run) -> None:
        """W of every layer will move."""
        for name in run.adapter.layers:
            run.adapter.move(name)

    def rate(self, step: int) -> float:
        """Rises after every restart but the first start."""
        since = step % self.every
        return (since + 1) / (self.warmup + 1) if step >= self.every and since < self.warmup else 1.0

    def gradients(self, run: Run) -> None:
        """Layers that were not drawn do not learn."""
        chosen = self._learning(run, run.step)
        for name, layer in run.adapter.layers.items():
            if name not in chosen:
                for parameter in layer.own_tensors().values():
                    parameter.grad = None

    def _learning(self, run: Run, step: int) -> set[str]:
        """The layers that learn in step 0, 1, ..."""
        names = list(run.adapter.layers)
        if self.layers is None:
            return set(names)
        return drawn(names, self.layers, run.train.seed, step // self.every)

    def looks(self, run: Run, examples: int) -> dict[str, float]:
        """At the rows of a step for each restart, where a start is measured."""
        kind = getattr(parts.load("init", run.adapter.plan.method.init.name), "measures", None)
        return {kind: self._restarts(run) * run.train.batch_size} if kind else {}

    def later(self, run: Run) -> float:
        """What was absorbed, in float32, as long as it is smaller than W."""
        found = 0
        for layer in run.adapter.layers.values():
            W, factors = layer.base.in_features * layer.base.out_features, layer.delta.factors()
            size = W if factors is None else sum(factor.numel() for factor in factors)
            found += 4 * size * min(self._restarts(run), (W - 1) // size)
        return found

    def _restarts(self, run: Run) -> int:
        return (run.total_steps - 1) // self.every

    @torch.no_grad()
    def stepped(self, run: Run) -> None:
        """Merge and start again, unless the run is over."""
        if run.step % self.every or run.step == run.total_steps:
            return
        method = run.adapter.plan.method
        init = parts.load("init", method.init.name)
        settings = parts.settings("init", method.init)
        kind = getattr(init, "measures", None)
        measured = run.measure(kind) if kind else {}
        for name in self._learning(run, run.step - 1):
            run.adapter.absorb(name)
        for name, layer in run.adapter.layers.items():
            before = {key: p.detach().clone() for key, p in layer.delta.named_parameters()}
            generator = generator_of(run.train.seed, f"{name}@{run.step}")
            if isinstance(layer.delta, LowRank):
                layer.delta.unfix()
            # On the CPU, where its generator is, as before the first step.
            device = layer.base_layer.weight.device
            delta = layer.delta if device.type == "cpu" else layer.delta.cpu()  # see `inject._wrap`
            init.init(delta, Start(layer.base, generator, measured.get(name)), **settings)
            if device.type != "cpu":
                delta.to(device)
            for key, parameter in layer.delta.named_parameters():
                self._forget(run, key, parameter, before, layer.delta, name)

    def _forget(
        self,
        run: Run,
        key: str,
        parameter: nn.Parameter,
        before: dict[str, Tensor],
        delta: nn.Module,
        name: str,
    ) -> None:
        """What the optimizer remembers of one factor."""
        state = run.optimizer.state.get(parameter)
        if not state or self.moments == 1:
            return
        if self.moments == 0:
            del run.optimizer.state[parameter]
        elif self.moments == "carry":
            if key == "B" and "exp_avg" in state:
                # B's moment, times the old A, is a moment of W; the new A projects it again.
                state["exp_avg"].copy_(state["exp_avg"] @ before["A"] @ delta.get_parameter("A").t())
        else:
            assert isinstance(self.moments, float)
            generator = generator_of(run.train.seed, f"moments of {name}.{key}@{run.step}")
            # Both moments of the same entries: a first without its second would be divided by almost nothing.
            kept = (torch.rand(parameter.shape, generator=generator) < self.moments).to(parameter.device)
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment].mul_(kept)
            # Else Adam would take the zeros for averages of many steps, and move by 3 to 6 times its rate.
            state["step"].zero_()


make = Restart


def drawn(names: list[str], count: int, seed: int, number: int) -> set[str]:
    """The layers that learn between restart `number` and the next."""
    order = torch.randperm(len(names), generator=generator_of(seed, f"layers@{number}")).tolist()
    return {names[index] for index in order[:count]}
