"""Parts of all axes in random company: what the rules let pass keeps every law, what they refuse has a reason.

Each part is drawn with whatever the other axes may put beside it; a new part is a new file, these tests find it.
"""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lora_cli import parts
from lora_cli.adapter import files, inject, peft_format, rules
from lora_cli.adapter import plan as plans
from lora_cli.adapter.inject import Adapter
from lora_cli.adapter.plan import Ends, Plan
from lora_cli.adapter.portable import saved_form
from lora_cli.data.example import Example
from lora_cli.errors import UserError
from lora_cli.methods.lifecycle.restart import Restart
from lora_cli.methods.lifecycle.restart import drawn as drawn_layers
from lora_cli.parts import Part
from lora_cli.presets import PRESETS, resolve
from lora_cli.recipe.schema import AdapterRecipe, TrainRecipe
from lora_cli.train import checkpoint, loop, optim
from lora_cli.train.measure import measure
from tests.training import accelerator

AXES = ("delta", "combine", "init", "scale", "trainable", "rank", "lifecycle", "optimizer", "dropout")
PARTS = [(axis, name) for axis in AXES for name in parts.names(axis)]
EACH = 8
"""Valid combinations that are drawn for every part; others hold it too."""
STEPS, STOP = 5, 3

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "delta.experts": [{"count": 3}],
    "delta.factors": [{"pool": 2}, {"pool": 3}],
    "delta.ffn_experts": [{"count": 3}, {"count": 4, "top": 3}],
    "delta.malora": [{"count": 3}, {"count": 4, "top": 3, "width": 1}],
    "delta.hydra": [{}, {"count": 2}],
    "delta.lokr": [{}, {"factor": 2}],
    "delta.loretta": [{"bond": 2}],
    "delta.lotr": [{}, {"share": "type"}, {"share": "all"}],
    "delta.melora": [{"n": 2}, {"n": 4}],
    "delta.nola": [{"bases": 6}, {"bases": 3, "seed": 5}],
    "delta.tied": [{}, {"share": "shape"}, {"share": "all"}],
    "delta.vb_lora": [{"vectors": 6, "length": 4}, {"vectors": 5, "length": 8, "k": 3}],
    "dropout.standard": [{"p": 0.0}, {"p": 0.0}, {"p": 0.2}],
    "init.corda": [{"rows": 4}, {"rows": 4, "mode": "kpm"}],
    "init.eva": [{"rows": 4}, {"rows": 4, "rho": 2.0}],
    "init.gradient_frame": [{"rows": 4}, {"rows": 4, "size": 5e-3}],
    "init.loftq": [{}, {"iterations": 3}],
    "init.lq": [{"iterations": 2}],
    "init.lq_fisher": [{"iterations": 2, "rows": 4}],
    "init.lqer": [{"rows": 4}],
    "init.lora_ga": [{"rows": 4}],
    "init.pissa": [{}, {"niter": 3}],
    "scale.constant": [{}, {"value": 0.5}],
    "delta.gated": [{}, {"start": 1.0}],
    "rank.alora": [{"rows": 2}, {"begin": 0.0, "rounds": 2, "rows": 3}],
    "rank.autolora": [{}, {"search": 0.5, "held_out": 0.5}],
    "rank.adalora": [{"every": 1}, {"every": 2, "initial": 2.0, "orthogonality": 0.0}],
    "rank.dora_dynamic": [{"every": 1, "end": 0.8}, {"every": 2, "initial": 2.0, "dispersion": 0.0}],
    "rank.dylora": [{}, {"frozen": True}],
    "rank.prilora": [{"every": 2}, {"every": 1, "share": 0.3, "spread": 0.8}],
    "rank.sora": [{"threshold": 0.1}, {"threshold": 1e-3}],
    "lifecycle.aflora": [{"every": 1, "begin": 0.0, "end": 0.8}, {"every": 2}],
    "lifecycle.dropbp": [{}],
    "lifecycle.lora_drop": [{"after": 0.4}],
    "lifecycle.loraprune": [{"every": 1, "begin": 0.0}, {"share": 0.2, "end": 0.6}],
    "lifecycle.bilora": [{}, {"share": 0.3, "orthogonality": 0.0}],
    "lifecycle.roselora": [{"density": 0.5}, {"density": 0.3, "begin": 0.0, "end": 0.5}],
    "lifecycle.sparse_adapter": [
        {"after": 1, "sparsity": 0.5},
        {"after": 2, "score": "random", "sparsity": 0.3},
    ],
    "lifecycle.delta_lora": [{"after": 0}, {"after": 2, "ratio": 0.5}],
    "lifecycle.restart": [
        {"every": 1},
        {"every": 2},
        {"every": 4, "moments": 1.0},
        {"every": 2, "moments": 0.5, "warmup": 1},
        {"every": 2, "moments": "carry"},
        {"every": 2, "layers": 1},
    ],
}
"""What a short run shows the effect of; parts that are not named here have their defaults."""
BESIDE: list[dict[str, Any]] = [
    *({"train_also": (word,)} for word in ("norms", "biases", "head", "embeddings")),
    *({"target_modules": names} for names in (("up", "down"), ("embed", "gate"), ("embed", "up", "head"))),
    {"target_modules": ("up", "gate"), "train_also": ("down",)},
    *({"rank_pattern": {"up": r}} for r in (1, 2, 12)),
    {"alpha_pattern": {"gate|down": 2.0}},
    {"alpha": 4.0},
    {"lora_bias": True, "target_modules": ("up", "down")},
    {"lora_bias": True},
]
"""Keys of a recipe beside the axes."""


# ---- what is trained --------------------------------------------------------------------------------------------


class Branch(nn.Module):
    """A part of a block, with linear layers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.gate = nn.Linear(8, 16, bias=False)
        self.down = Conv1D(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the residual stream."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """A residual block with one branch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), Branch()
        for tensor in (self.norm.bias, self.mlp.down.weight, self.mlp.down.bias):
            nn.init.normal_(tensor, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        """The stream, and what the branch makes of it."""
        return x + self.mlp(self.norm(x))


class Tiny(nn.Module):
    """The smallest language model that the loop takes, with layers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList([Block()])
        self.head = nn.Linear(8, 16, bias=False)

    def forward(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
        """Logits, as models of transformers give them."""
        return SimpleNamespace(logits=self.head(self.blocks[0](self.embed(input_ids))))

    def get_output_embeddings(self) -> nn.Module:
        """Where the loss lets only the trained positions through."""
        return self.head


ENDS = Ends("embed", "head", tied=False)
IDS = torch.arange(16).view(2, 8)


class Rows(list[Example]):
    """Random examples in memory, with what the loop asks of those on disk."""

    def __init__(self) -> None:
        chosen = random.Random(0)
        for number in range(8):
            ids = tuple(chosen.randrange(16) for _ in range(chosen.randint(4, 7)))
            self.append(Example(ids, (False, *[True] * (len(ids) - 1)), f"memory:{number}"))
        self.lengths = np.array([len(example.input_ids) for example in self])
        self.trained_counts = self.lengths - 1


# ---- combinations -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Combination:
    """One part an axis, of the lifecycle any number, and keys beside them."""

    chosen: dict[str, tuple[Part, ...]]
    beside: dict[str, Any]

    @property
    def parts(self) -> list[str]:
        """`axis.name` of each."""
        return [f"{axis}.{part.name}" for axis, found in self.chosen.items() for part in found]

    @property
    def adapter(self) -> AdapterRecipe:
        """The section of a recipe."""
        single = {
            axis: found[0]
            for axis, found in self.chosen.items()
            if axis not in ("base", "lifecycle", "optimizer")
        }
        return AdapterRecipe(**single, lifecycle=self.chosen["lifecycle"], **self.beside)

    @property
    def train(self) -> TrainRecipe:
        """The section of a recipe, with a rate at which some steps are seen in float32."""
        optimizer = self.chosen["optimizer"][0]
        rate = 0.1 if optimizer.name == "sgd" else 3e-3
        return TrainRecipe(
            max_steps=STEPS,
            batch_size=4,
            micro_batch_size=2,
            learning_rate=rate,
            weight_decay=0.01,
            optimizer=optimizer,
        )

    def plan(self, model: nn.Module) -> Plan:
        """As `lora check` makes it."""
        (base,) = self.chosen.get("base") or (None,)
        quantize = base and base.name
        bits = 4.5 if quantize == "nf" else None
        return plans.make(
            self.adapter, model, ENDS, optimizer=self.train.optimizer, quantize=quantize, bits=bits
        )

    def __str__(self) -> str:
        named = [
            f"{axis}: {part.name} {part.settings or ''}"
            for axis, found in self.chosen.items()
            for part in found
        ]
        return "\n".join([*named, str(self.beside)])


def drawn(axis: str, name: str, chance: random.Random) -> Combination:
    """A preset's parts, some of them exchanged for others, this one for sure."""
    chosen = {
        axis: [part.name for part in found]
        for axis, found in some_preset(chance.choice(list(PRESETS))).items()
    }
    for other in AXES:
        if chance.random() < 0.3:
            count = chance.choice((0, 1, 1, 2)) if other == "lifecycle" else 1
            chosen[other] = chance.choices(parts.names(other), k=count)
    if name not in chosen[axis]:
        chosen[axis] = [name]
    beside: dict[str, Any] = {"r": chance.choice((1, 2, 2, 4, 4, 8, 3))}
    for more in chance.sample(BESIDE, chance.choice((0, 0, 1, 2))):
        beside |= more
    found = {axis: tuple(with_settings(axis, n, chance) for n in chosen[axis]) for axis in AXES}
    needs = {need for other in AXES for part in found[other] for need in rules.stated("needs", other, part)}
    if "base.int4" in needs:
        found["base"] = (Part("int4"),)
    elif "base.quantized" in needs or chance.random() < 0.1:
        found["base"] = (Part(chance.choice(("nf4", "nf", "int4", "int8"))),)
    return Combination(found, beside)


@cache
def some_preset(name: str) -> dict[str, tuple[Part, ...]]:
    return resolve(AdapterRecipe(method=name)).chosen()


def with_settings(axis: str, name: str, chance: random.Random) -> Part:
    return Part(name, chance.choice(SETTINGS.get(f"{axis}.{name}", [{}])))


@dataclass
class Found:
    """What was drawn for one part."""

    valid: list[Combination] = field(default_factory=list)
    refused: list[tuple[Combination, UserError]] = field(default_factory=list)


@cache
def found(axis: str, name: str) -> Found:
    """Draw until there are enough valid ones. No weights: the model is on the meta device."""
    chance, made = random.Random(f"{axis}.{name}"), Found()
    with torch.device("meta"):
        model = Tiny()
    for _ in range(5000):
        if len(made.valid) == EACH:
            break
        combination = drawn(axis, name, chance)
        try:
            combination.plan(model)
        except UserError as error:
            made.refused.append((combination, error))
        except Exception as error:
            raise AssertionError(f"neither planned nor refused:\n{combination}") from error
        else:
            made.valid += [combination] if combination not in made.valid else []
    return made


def test_every_part_stands_in_enough_of_300_valid_combinations():
    valid = {str(each): each for axis, name in PARTS for each in found(axis, name).valid}
    refused = {str(each) for axis, name in PARTS for each, _ in found(axis, name).refused}
    counts = Counter(part for each in valid.values() for part in each.parts)
    print(f"\n{len(valid)} valid, {len(refused)} refused:", *sorted(counts.items()), sep="\n  ")
    assert len(valid) >= 300
    assert {
        f"{axis}.{name}": counts[f"{axis}.{name}"] for axis, name in PARTS if counts[f"{axis}.{name}"] < 5
    } == {}


@pytest.mark.parametrize(("axis", "name"), PARTS)
def test_a_refusal_gives_a_reason_and_the_key_it_is_about(axis, name):
    for combination, error in found(axis, name).refused:
        for line in str(error).splitlines():
            where, _, reason = line.partition(": ")
            assert where.startswith(("adapter", "train", "  →")), f"{error}\n{combination}"
            assert len(reason.split()) >= 3 or where.startswith("  →"), f"{error}\n{combination}"


@pytest.mark.parametrize(
    ("axis", "name"), [(axis, name) for axis in parts.AXES for name in parts.names(axis)]
)
def test_what_a_part_needs_and_forbids_exists(axis, name):
    known = {f"{other}.{each}" for other in parts.AXES for each in parts.names(other)}
    known |= {
        *("base.quantized", "base.packed"),
        rules.MERGEABLE,
        rules.DROPS,
        rules.SHIFTED,
        *AdapterRecipe.model_fields,
        *(f"train.{key}" for key in TrainRecipe.model_fields),
    }
    for settings in SETTINGS.get(f"{axis}.{name}", [{}]):
        for kind in ("needs", "forbids"):
            stated = rules.stated(kind, axis, Part(name, settings))
            assert {fact for facts in stated for fact in facts.split(" or ")} <= known
            assert all(len(reason.split()) > 2 for reason in stated.values())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "2, delta_lora": ({"lifecycle": "delta_lora", "dropout": 0.1}, "W would move by more"),
    "2, optimizer_view": ({"combine": "optimizer_view", "dropout": 0.1}, "no input of A"),
    "8, restart": ({"method": "molora", "lifecycle": "restart"}, "needs a mergeable delta"),
    "8, dora": ({"method": "hydra_lora", "combine": "dora"}, "needs a mergeable delta"),
    "8, delta_lora": ({"method": "hydra_lora", "lifecycle": "delta_lora"}, "needs delta.lowrank"),
    "8, optimizer_view": ({"method": "mov", "combine": "optimizer_view"}, "needs delta.lowrank"),
    "8, a lookup": ({"method": "molora", "target_modules": ("embed",)}, "cannot read token ids"),
    "8, heads of zero": ({"method": "hydra_lora", "trainable": "only_a"}, "B would stay zero"),
    "8, heads without a router": ({"method": "hydra_lora", "init": "kaiming"}, "a router has to be drawn"),
    "8, part of an MLP": ({"method": "mixlora_moe", "target_modules": ("up", "down")}, "gate is left out"),
    "8, nothing to balance": ({"method": "molora", "lifecycle": "load_balance"}, "sent to some experts"),
    "4": ({"method": "adalora", "init": "eva"}, "one of both has to decide"),
    "4, restart": ({"method": "adalora", "lifecycle": "restart"}, "decides over a whole run"),
    "6": (
        {"method": "dora", "lora_bias": True, "target_modules": ("up",)},
        "cannot be combined with adapter.lora_bias",
    ),
    "7, LoRA+": ({"trainable": "lora_fa", "optimizer": "lora_plus"}, "one rate only"),
    "7, LoRA+ of A": ({"method": "galore", "lifecycle": (), "optimizer": "lora_plus"}, "one rate only"),
    "9, additive": ({"method": "additive", "r": 3}, "has to divide both sides"),
    "9, miss": ({"method": "miss", "r": 3}, "has to divide the inputs"),
    "10": ({"init": "corda", "target_modules": ("embed",)}, "no covariance"),
    "a frozen zero": ({"init": "galore", "trainable": "lora_fa"}, "A would stay zero"),
    "a frozen zero of a lookup": ({"method": "lora_fa", "target_modules": ("embed",)}, "starts at zero"),
    "nothing trains": ({"method": "miss", "trainable": "only_a"}, "nothing would train"),
    "never learns": ({"lifecycle": {"restart": {"every": 1}}}, "the other one never learns"),
    "no moment": ({"lifecycle": {"restart": {"moments": 0.5}}, "optimizer": "sgd"}, "it has no moments"),
    "no effect": ({"method": "full", "trainable": "lora_fa"}, "it is one tensor"),
    "twice": ({"lifecycle": ("delta_lora", "delta_lora")}, "stands there twice"),
}
"""By the numbers of the rules for existing parts in the notes on methods, and what came up here."""


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_there_are_weights(case):
    asked, reason = REFUSED[case]
    beside = {key: value for key, value in asked.items() if key != "optimizer"}
    train = TrainRecipe(optimizer=asked.get("optimizer"))
    with torch.device("meta"):
        model = Tiny()
    with pytest.raises(UserError, match=reason):
        plans.make(AdapterRecipe.model_validate(beside), model, ENDS, optimizer=train.optimizer)


# ---- the laws ---------------------------------------------------------------------------------------------------


def begun(combination: Combination) -> loop.Training:
    """A run about to take its first step, made as `run.prepare` makes it."""
    model, examples = Tiny().eval(), Rows()
    plan, part = combination.plan(model), combination.chosen["init"][0]
    init, settings = parts.load("init", part.name), parts.settings("init", part)
    statistics: dict[str, Tensor] = {}
    if hasattr(init, "measures"):
        bases = {name: peft_format.base_of(model, name) for name in plan.measured}
        statistics = measure(
            init.measures, model, bases, examples, range(4), precision=torch.float32, pad_id=0
        )
    if hasattr(init, "ranks"):
        plan = plans.with_ranks(plan, init.ranks({s.name: s.r for s in plan.layers}, statistics, **settings))
    adapter = inject.inject(model, plan, 0, statistics)
    return loop.Training(
        model=model,
        adapter=adapter,
        examples=examples,
        optimizer=optim.make(adapter, combination.train),
        train=combination.train,
        accelerator=accelerator(),
        precision=torch.float32,
        packing=False,
        pad_id=0,
    )


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def trained(run: loop.Training, folder: Path | None = None) -> None:
    """To the end; in `folder` a checkpoint is left on the way."""
    for lifecycle in run.lifecycles:
        if isinstance(lifecycle, Restart):
            lifecycle.stepped = keeping_the_function(lifecycle.stepped)
    run.model.train()
    for report in loop.train_steps(run):
        if folder is not None and report.step == STOP:
            checkpoint.save(folder, run, {})
    run.model.eval()


def keeping_the_function(stepped: Callable[[loop.Training], None]) -> Callable[[loop.Training], None]:
    """The hook of a lifecycle that changes only how the model is written; what it measures is that model, too."""

    def checked(run: loop.Training) -> None:
        before, measure_now = output(run.model), run.measure

        def same(when: str) -> None:
            assert distance(output(run.model), before) < 1e-5, f"a restart keeps the function, {when}"
            run.model.train()

        def measured(kind: str) -> dict[str, Tensor]:
            same("where it measures")
            return measure_now(kind)

        run.measure = measured
        run.model.train()
        stepped(run)
        run.measure = measure_now
        same("at its end")

    return checked


def copies(adapter: Adapter) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in inject.tensors_of(adapter).items()}


def distance(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return (torch.linalg.norm(a.double() - b.double()) / torch.linalg.norm(b.double())).item()


def frozen(combination: Combination, adapter: Adapter) -> set[str]:
    """The tensors that stay what they are: not trained, and none that a lifecycle writes to."""
    untrained = adapter.named_tensors().keys() - adapter.trainable().keys()
    if has(combination, "restart"):
        return set()
    if has(combination, "aflora"):  # they were frozen on the way
        untrained = {name for name in untrained if not name.endswith((".A", ".B"))}
    if has(combination, "loraprune"):  # which rows stay
        untrained = {name for name in untrained if not name.endswith(".k")}
    if combination.chosen["rank"][0].name in (
        "alora",
        "autolora",
    ):  # others take their place, frozen as they were
        untrained = {name for name in untrained if not name.endswith((".A", ".B", ".E"))}
    return {name for name in untrained if not (has(combination, "delta_lora") and ".fixed_" in name)}


def moving(combination: Combination, adapter: Adapter) -> set[str]:
    """The trained tensors that are others at the end: not closed gates, nor what the last restart held back."""
    restart = next((part.settings for part in combination.chosen["lifecycle"] if part.name == "restart"), {})
    held_back: set[str] = set()
    if count := restart.get("layers"):
        last = (STEPS - 1) // restart["every"]
        held_back = adapter.layers.keys() - drawn_layers(list(adapter.layers), count, 0, last)
    closing = (".E",) if combination.chosen["rank"][0].name in ("adalora", "dora_dynamic", "sora") else ()
    learning = {name for name in adapter.trainable() if not name.endswith(closing)}
    return {name for name in learning if not name.startswith(tuple(f"{layer}." for layer in held_back))}


def has(combination: Combination, lifecycle: str) -> bool:
    return any(part.name == lifecycle for part in combination.chosen["lifecycle"])


LAWS = {
    "base": "starts as the base",
    "planned": "trains as many numbers as planned",
    "moves": "no trained tensor is dead, every one moves",
    "frozen": "nothing else moves, W0 neither; without the adapter it is the base to the bit",
    "saved": "what is saved computes on the original base what was trained",
    "resumed": "goes on from a checkpoint to the bit",
    "merged": "merged computes the same as live; merging what depends on the input is refused",
}
"""What has to hold of every valid combination."""


class Held(list[str]):
    """The laws that were held so far."""

    def hold(self, law: str, *facts: bool) -> None:
        """Note the law where all facts are true, and fail where one is not."""
        assert all(facts), f"{LAWS[law]}: {facts}"
        self.append(law)


def check_laws(combination: Combination, folder: Path, goes_on: bool = True) -> Held:
    """Everything that has to hold of a valid combination, in the order of a run.

    Args:
        combination: what is trained.
        folder: where checkpoint and adapter may be written.
        goes_on: whether to go on from the checkpoint, too, which takes as long as the rest.

    Returns:
        The laws that were checked, all of which hold.
    """
    base, held = Tiny().eval(), Held()
    plain, original = output(base), base.state_dict()
    run = begun(combination)
    adapter = run.adapter
    if adapter.codes is not None:  # the base is what the codes say
        with inject.without_adapters(adapter):
            plain, original = output(run.model), run.model.state_dict()
    delta = parts.load("delta", adapter.plan.method.delta.name)
    near = 1e-2 if hasattr(delta, "approximates") else 1e-5
    if hasattr(parts.load("init", combination.chosen["init"][0].name), "approximates"):
        near = 1.0
    held.hold("base", distance(output(run.model), plain) < near)

    planned = adapter.plan.num_trainable
    planned += sum(base.get_parameter(name).numel() for name in adapter.plan.also)
    held.hold("planned", planned == sum(p.numel() for p in adapter.trainable().values()))

    before = copies(adapter)
    trained(run, folder)
    after = copies(adapter)
    learned = output(run.model)
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    left = moving(combination, adapter) - changed
    held.hold("moves", bool(run.connected.all()), not left, not torch.equal(learned, plain))

    form = saved_form(adapter)
    with inject.without_adapters(adapter):
        same = torch.equal(output(run.model), plain)
        now = run.model.state_dict()
        kept = now.keys() == original.keys() and all(torch.equal(now[key], original[key]) for key in original)
        held.hold("frozen", not changed & frozen(combination, adapter), same, kept)
        (folder / "adapter").mkdir(parents=True)
        files.write(folder / "adapter", form, run.model, "the/base", None, (), run.adapter.codes)

    saved = files.read(folder / "adapter")
    loaded = inject.inject(base, files.plan_of(saved, base, ENDS), taken=files.taken_of(saved, base))
    files.fill(loaded, saved)
    held.hold("saved", distance(output(base), learned) < 1e-5)

    if goes_on:
        again = begun(combination)
        checkpoint.restore(folder / f"step-{STOP:06d}", again)
        trained(again)
        went_on = copies(again.adapter)
        assert went_on.keys() == after.keys()
        bits = all(torch.equal(went_on[name], after[name]) for name in after)
        held.hold("resumed", bits, torch.equal(output(again.model), learned))

    if not rules.is_mergeable(adapter.plan.method):
        with pytest.raises(UserError, match="depends on the input"):
            inject.merge(run.model, adapter)
        held.hold("merged", torch.equal(output(run.model), learned))
        return held
    inject.merge(run.model, adapter)
    assert not inject.adapted_layers(run.model)
    held.hold("merged", distance(output(run.model), learned) < 1e-4)
    return held


@pytest.mark.parametrize(("axis", "name"), PARTS)
def test_a_part_keeps_every_law_in_whatever_company_the_rules_allow(axis, name, tmp_path, record_property):
    for number, combination in enumerate(found(axis, name).valid):
        try:
            held = check_laws(combination, tmp_path / str(number), goes_on=number % 2 == 0)
        except Exception as error:
            raise AssertionError(f"{error}, with\n{combination}") from error
        record_property(str(combination), {"parts": combination.parts, "held": list(held)})


def simple(**adapter: Any) -> Combination:
    """A method by its name, with whatever is asked for on top."""
    asked = AdapterRecipe.model_validate({"r": 2, **adapter})
    beside = {"r": asked.r, "target_modules": asked.target_modules}
    return Combination(resolve(asked).chosen(), beside)


UNEVEN: dict[str, Any] = {"init": {"eva": {"rows": 4, "rho": 2.0}}, "r": 3}
ONCE_WRONG: dict[str, dict[str, Any]] = {
    "ranks shared out, rslora": {**UNEVEN, "scale": "rslora"},
    "ranks shared out, dora": {**UNEVEN, "combine": "dora"},
    "no 2r directions": {"init": {"lora_ga": {"rows": 4}}, "trainable": "only_a", "r": 8},
    "W moves from the first step on": {"init": "pissa", "lifecycle": {"delta_lora": {"after": 0}}},
    "the measured start of a view": {
        "init": "galore",
        "combine": "optimizer_view",
        "lifecycle": {"restart": {"every": 2}},
    },
    **{
        f"{init} again": {"init": init, "lifecycle": {"restart": {"every": 2}}}
        for init in ("pissa", "milora", "olora", "symmetric")
    },
    "miss again": {"method": "miss", "lifecycle": {"restart": {"every": 2}}},
}


@pytest.mark.parametrize("case", ONCE_WRONG)
def test_what_was_once_wrong_keeps_every_law(case, tmp_path):
    check_laws(simple(**ONCE_WRONG[case]), tmp_path)


def test_ranks_are_shared_out_unevenly():
    ranks = [spec.r for spec in begun(simple(**UNEVEN)).adapter.plan.layers]
    assert len(set(ranks)) > 1
    assert sum(ranks) == 3 * len(ranks)


def test_a_layer_that_waits_for_its_turn_is_not_taken_for_a_dead_one():
    run = begun(simple(lifecycle={"restart": {"every": 50, "layers": 1}}))
    run.train = run.train.model_copy(update={"max_steps": loop.WATCHED_STEPS + 2})
    assert len(list(loop.train_steps(run))) == loop.WATCHED_STEPS + 2


@pytest.mark.parametrize("kind", ["inputs", "gradients"])
@pytest.mark.parametrize("combine", ["add", "optimizer_view"])
def test_what_is_measured_of_an_adapted_layer_is_what_the_merged_one_has(combine, kind):
    run = begun(simple(combine=combine, init="symmetric"))
    trained(run)
    under = run.measure(kind)
    inject.merge(run.model, run.adapter)
    bases = {name: peft_format.base_of(run.model, name) for name in run.adapter.layers}
    rows = run.rows(run.step)
    merged = measure(kind, run.model, bases, run.examples, rows, precision=torch.float32, pad_id=0)
    assert all(distance(under[name], merged[name]) < 1e-4 for name in merged)
    assert all(torch.count_nonzero(each) for each in merged.values())
