"""A micro-batch of training on tensors that have a shape and no numbers: what it would hold, and what it would compute.

Model, adapter, loss, recomputation and optimizer are those of `lora train`. PyTorch's FakeTensorMode runs them without
memory or arithmetic, and a tally counts. No formula knows an architecture. Blocks that are alike are not all rehearsed:
what a few of them did, phase by phase, is played back for the others.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice, repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lora_cli import attention, parts, varlen
from lora_cli import model as models
from lora_cli.adapter import rules
from lora_cli.adapter.inject import inject
from lora_cli.adapter.plan import Plan
from lora_cli.adapter.quantised import Quantised
from lora_cli.adapter.reading import reading
from lora_cli.analyze.alike import looks, stand_ins
from lora_cli.analyze.imagined import LONG, Imagined, found
from lora_cli.analyze.tally import Phase, Tally, Work, aten
from lora_cli.analyze.tape import Cost, Tape, apart, cut
from lora_cli.blocks import blocks
from lora_cli.data.example import Batch
from lora_cli.errors import ExitCode, UnknownCostError, UserError
from lora_cli.experts import SplitExperts
from lora_cli.model import LanguageModel
from lora_cli.parts import Part
from lora_cli.recipe.schema import Recipe
from lora_cli.train import optim
from lora_cli.train.elementwise import keep_less
from lora_cli.train.head import parts as parts_of_head
from lora_cli.train.loss import Loss
from lora_cli.train.recompute import keep, recompute

NAME = "lora_rehearsed"
BENDING = {aten.tanh, aten.clamp, aten.sigmoid}
"""What models do to their logits that is no multiplication."""
CPU = torch.device("cpu")
"""Fake tensors are on the CPU whatever the run is to be on: only attention and the head depend on it."""


@dataclass(frozen=True)
class Rows:
    """What a micro-batch is made of."""

    lengths: tuple[int, ...]
    """Tokens of each document."""
    trained: int
    """Tokens that are learned."""
    packed: bool
    """One behind the other in a row, or padded to the longest."""

    @property
    def cells(self) -> int:
        """Tokens computed, padding included."""
        return sum(self.lengths) if self.packed else max(self.lengths) * len(self.lengths)

    @property
    def pairs(self) -> int:
        """Σ length², which the cost of attention goes by."""
        lengths = self.lengths if self.packed else [max(self.lengths)] * len(self.lengths)
        return sum(length**2 for length in lengths)


@dataclass(frozen=True)
class Held:
    """Bytes that are there between steps, and the gradients that a step collects."""

    weights: int
    """The model's own, frozen or not."""
    adapter: int
    """Masters of what is trained, and what comes with them."""
    gradients: int
    optimizer: int

    @property
    def always(self) -> int:
        """All but the gradients."""
        return self.weights + self.adapter + self.optimizer


@contextmanager
def rehearsal(
    recipe: Recipe,
    plan_for: Callable[[LanguageModel], Plan],
    *,
    tokenizer: Any = None,
    stored: torch.dtype,
    precision: torch.dtype,
    device: torch.device = CPU,
    steps: int = LONG,
    examples: int = LONG,
) -> Iterator["Rehearsal"]:
    """Everything that training needs, without weights; nothing is read but the model's configuration.

    Args:
        recipe: what to do.
        plan_for: the plan of a model.
        tokenizer: the model's; only needed where the recipe adds tokens.
        stored: the type of the base's weights.
        precision: what the model computes in.
        device: what the run is to be on.
        steps: of the whole run.
        examples: that it is trained on.
    """
    eager = {"attn_implementation": "eager"} if recipe.model.attention == "eager" else {}
    tally = Tally()
    with FakeTensorMode(allow_non_fake_inputs=True), tally:
        model = models.skeleton(recipe.model, "cpu", dtype=stored, **eager)
        language = models.with_tokens(model, tokenizer, recipe.model)
        plan = plan_for(language)
        _refuse_codes(model)
        tally.experts = max(
            (len(each) for each in model.modules() if isinstance(each, SplitExperts)), default=0
        )
        with _known():
            # First values of adapters ask whether all is finite, or how large something is, some of them until they
            # hear what they want: yes and no by turns, and not for ever.
            tally.answers = islice(cycle((1, 0)), 10_000)
            plain = _over_plain_weights(plan)
            adapter = inject(model, plain, recipe.train.seed, _statistics(plain))
            tally.answers = iter(())
            keep_less(model)
            model.train()
            quantised = None if plan.method.base is None else plan.method.base.name
            run = Imagined(model, adapter, optim.make(adapter, recipe.train), recipe.train)
            rehearsed = Rehearsal(model, run, precision, tally, quantised, device, plan.budget)
            run.total_steps, run.examples = steps, examples
        yield rehearsed


@contextmanager
def _known() -> Iterator[None]:
    """Say that code asks for numbers, or for a rule of shapes that PyTorch has not.

    Raises:
        UnknownCostError: the model's code, or a method's.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # foreign code fails in its own way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        what = f"this model cannot be rehearsed with this method: {reason}"
        raise UnknownCostError(what, where="model.name", code=ExitCode.MODEL) from error


def _refuse_codes(model: torch.nn.Module) -> None:
    """Refuse a model whose files hold codes: they cannot be made of weights without values.

    Raises:
        UnknownCostError: what to do instead.
    """
    if any(isinstance(module, Quantised) for module in model.modules()):
        what, fix = "its files hold codes, not weights", "estimate it for the model that they were made of"
        raise UnknownCostError(what, where="model.name", fix=fix, code=ExitCode.MODEL)


def _over_plain_weights(plan: Plan) -> Plan:
    """A plan that quantises nothing, because that takes values; what codes take is counted afterwards."""
    if plan.method.base is None:
        return plan
    init = plan.method.init
    asks = "base.quantized" in rules.stated("needs", "init", init)
    method = replace(plan.method, base=None, init=Part(name="kaiming") if asks else init)
    return replace(plan, method=method, quantised={}, taken=False, budget=None)


def _statistics(plan: Plan) -> dict[str, Tensor]:
    """What an init would have measured."""
    kind = getattr(parts.load("init", plan.method.init.name), "measures", None)
    return found(kind, plan.layers) if kind else {}


@dataclass
class Rehearsal:
    """A model about to take steps that cost nothing; only inside `rehearsal`."""

    model: PreTrainedModel
    run: Imagined
    precision: torch.dtype
    tally: Tally
    base: str | None = None
    """What the linear layers of the blocks are quantised to; None where they are not."""
    device: torch.device = CPU
    """What the run is to be on."""
    bits: float | None = None
    """That a quantised weight takes on average, where each layer gets its own."""

    def __post_init__(self) -> None:
        """Take the first update, so that gradients, what parts keep, and the optimizer's memory are there."""
        self.adapter = self.run.adapter
        part = self.adapter.plan.method.attention
        axis = parts.load("attention", part.name)
        self.attend = axis.make(self.model, **parts.settings("attention", part))
        self.apart = hasattr(axis, "APART")
        with unset_fake_temporarily():  # what they draw by lot has numbers
            for lifecycle in self.run.rehearsed:
                lifecycle.setup(self.run)
        own = {id(p): p for p in self.model.parameters()} | {
            id(p): p for p in self.adapter.originals.values()
        }
        self.tensors = {id(p) for p in self.adapter.named_tensors().values()}
        """Those of the adapter, by their ids."""
        weights = sum(p.nbytes for key, p in own.items() if key not in self.tensors)
        adapter = self.tally.live - weights
        trained = list(self.adapter.trainable().values())
        for p in trained:
            p.grad = torch.empty_like(p)
        gradients = sum(p.nbytes for p in trained)
        self.tally.mark()
        self._update()
        update = self.tally.mark()
        self.update, self.update_peak = update.work, update.high
        """What an update computes; bytes that it takes for a moment, and those that stay."""
        self.held = Held(weights, adapter, gradients, update.left)
        self.known: dict[tuple[Rows, int], Cost] = {}
        self.tapes: dict[Any, Tape] = {}
        self.blocks = blocks(self.model)
        types = getattr(self.model.config, "layer_types", None) or [None] * len(self.blocks)
        kinds: dict[Any, int] = {}
        each = (looks(block, kind) for block, kind in zip(self.blocks, types, strict=True))
        self.alike = [kinds.setdefault(look, len(kinds)) for look in each]
        """For each block a number that it shares with those like it."""
        self.loss = Loss(self.model, 1.0 if self._multiplies_logits() else None, self._split)

    def _update(self) -> None:
        """What comes after the last micro-batch of a step."""
        self.tally.answers = repeat(1)  # all is finite
        with unset_fake_temporarily():
            for lifecycle in self.run.rehearsed:
                penalty = lifecycle.penalty(self.run)
                if penalty is not None:
                    penalty.backward()
            for lifecycle in self.run.rehearsed:
                lifecycle.gradients(self.run)
            self.run.optimizer.step()
            self.run.step += 1
            for lifecycle in self.run.rehearsed:
                lifecycle.stepped(self.run)
        self.tally.answers = iter(())
        self.adapter.absorbed = {name: [] for name in self.adapter.absorbed}  # of that `later` tells

    def cost(self, rows: Rows, recomputed: int = 0) -> Cost:
        """Of a micro-batch, where so many blocks are computed again, from the bottom.

        Raises:
            UserError: the model does not compute without numbers.
        """
        if (rows, recomputed) not in self.known:
            with _known():
                self.known[rows, recomputed] = self._cost(rows, recomputed)
        return self.known[rows, recomputed]

    def look(self, kind: str, rows: Rows) -> Cost:
        """Of a micro-batch that is looked at for what a part of the method asks; `kind`: see `Lifecycle.looks`."""
        cost, layers = self.cost(rows), self.adapter.plan.layers
        if kind in ("loss", "inputs"):
            # The head multiplies once, where training does it forward and backward.
            head = replace(cost.work["head"], products=cost.work["head"].products / 2)
            beside = Work(products=sum(2.0 * rows.cells * spec.in_features**2 for spec in layers))
            work = {"blocks": cost.forward + (beside if kind == "inputs" else Work()), "head": head}
            return replace(cost, work=work)
        of_W = Work(products=sum(2.0 * rows.cells * spec.in_features * spec.out_features for spec in layers))
        return replace(cost, work=cost.work | {"blocks": cost.work["blocks"] + of_W})

    def looking(self, kind: str, longest: int) -> float:
        """Bytes that are there for a moment where the adapted layers are measured, one row at a time."""
        measured = sum(tensor.nbytes for tensor in found(kind, self.adapter.plan.layers).values())
        if kind == "inputs":
            return measured
        gradients = sum(layer.base.module.weight.nbytes for layer in self.adapter.layers.values())
        return measured + gradients + self.cost(Rows((longest,), longest - 1, packed=False)).peak

    def _cost(self, rows: Rows, recomputed: int) -> Cost:
        if recomputed:
            recompute(self.model, recomputed)
        try:
            kinds = self._kinds(recomputed)
            standing = stand_ins(kinds)
            chosen = sorted(set(standing))
            key = rows, tuple(kinds[index] for index in chosen)
            if key not in self.tapes:
                self.tapes[key] = self._tape(rows, chosen)
            order = [chosen.index(index) for index in standing]
            return self.tapes[key].played(order, self.run.again, *self.run.backward)
        finally:
            keep(self.model)

    def _kinds(self, recomputed: int) -> list[Any]:
        """For each block what its cost depends on."""
        trains = any(p.requires_grad for p in models.end_modules(self.model)[0].parameters())
        found: list[Any] = []
        for index, (block, alike) in enumerate(zip(self.blocks, self.alike, strict=True)):
            own = any(p.requires_grad for p in block.parameters())
            # Below the first trained tensor nothing is kept; where the gradient ends, one product less is computed.
            found.append((alike, trains, own, index < recomputed))
            trains = trains or own
        return found

    @contextmanager
    def _only(self, chosen: Sequence[int]) -> Iterator[None]:
        """The model with these of its blocks."""
        inside = {id(self.blocks[index]) for index in chosen}
        parents = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList) and any(each in self.blocks for each in module)
        }
        config, types = self.model.config, getattr(self.model.config, "layer_types", None)
        count = config.num_hidden_layers
        for name, parent in parents.items():
            self.model.set_submodule(name, nn.ModuleList(each for each in parent if id(each) in inside))
        config.num_hidden_layers = len(chosen)
        if types is not None:
            config.layer_types = [types[index] for index in chosen]
        try:
            yield
        finally:
            for name, parent in parents.items():
                self.model.set_submodule(name, parent)
            config.num_hidden_layers = count
            if types is not None:
                config.layer_types = types

    def _tape(self, rows: Rows, chosen: Sequence[int]) -> Tape:
        """Of one micro-batch through these blocks; of many documents in a row none is rehearsed by itself."""
        if not rows.packed or len(rows.lengths) <= 2 or self._in_one():
            return Tape.of(self._phases(rows, rows.lengths, chosen), len(chosen))
        tokens = sum(rows.lengths)
        one, two = (self._phases(rows, lengths, chosen) for lengths in ((tokens,), cut(tokens)))
        together = zip(one, two, strict=True)
        return Tape.of([apart(a, b, rows.lengths) for a, b in together], len(chosen))

    def _phases(self, rows: Rows, lengths: Sequence[int], chosen: Sequence[int]) -> list[Phase]:
        """Forward and backward of one micro-batch, whose documents attend as if they had these lengths."""
        phases: list[Phase] = []
        batch = _batch(rows)
        self.tally.lengths, self.run.again = rows.lengths, 0
        known = reading(self.model, batch.reading)
        with self._only(chosen), self._attention(rows, lengths), self._marked(chosen, phases), known:
            self.tally.mark()
            with models.computing(self.model, self.precision):
                loss = self.loss.at(batch, CPU, *(torch.zeros(2, rows.trained, dtype=torch.int64)))
            self.run.loss, self.run.learned = self.loss, rows.trained
            for lifecycle in self.run.rehearsed:
                added = lifecycle.loss(self.run, batch)
                loss = loss if added is None else loss + added
            phases.append(self.tally.mark())
            loss.backward()
            phases.append(self.tally.mark())
        return phases

    @contextmanager
    def _marked(self, chosen: Sequence[int], phases: list[Phase]) -> Iterator[None]:
        """Collect a phase wherever a block or the head begins or ends, forward and backward."""

        def mark(*_: object) -> None:
            phases.append(self.tally.mark())

        def first(*_: object) -> None:
            if not phases:  # else it is computed again
                mark()

        def forward(_: object, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
            if len(phases) > len(chosen):
                return  # as above
            mark()
            hidden = output if isinstance(output, Tensor) else output[0]
            if hidden.requires_grad:
                hidden.register_hook(mark)

        handles = [self.blocks[index].register_forward_hook(forward) for index in chosen]
        handles.append(self.blocks[chosen[0]].register_forward_pre_hook(first))
        handles.append(models.end_modules(self.model)[1].register_forward_pre_hook(mark))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _in_one(self) -> bool:
        """Whether one kernel attends to all documents of a row, told where each ends."""
        return self.attend is None and varlen.serves(self.model, self.device)

    @contextmanager
    def _attention(self, rows: Rows, lengths: Sequence[int]) -> Iterator[None]:
        """Let documents see what they see in training, where transformers decides by numbers that are not there."""
        before = str(self.model.config._attn_implementation)
        together = rows.packed and len(rows.lengths) > 1
        alike = len(set(rows.lengths)) == 1 and not together
        told = together and self._in_one()
        ends = torch.zeros(len(rows.lengths) + 1, dtype=torch.int32)
        documents = varlen.Documents(rows.lengths, ends, self.device)
        if before == "eager" or not (together or alike or self.attend):
            yield
            return

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any
        ) -> tuple[Tensor, Tensor | None]:
            if self.attend is not None:
                return self._attended(lengths, module, query, key, value, mask, settings), None
            if told:
                return varlen.attend(module, query, key, value, mask, documents, **settings)
            window = settings.get("sliding_window")
            if alike or (window and max(rows.lengths) > window):
                return sdpa_attention_forward(module, query, key, value, mask, **settings)
            return attention.apart(lengths, module, query, key, value, **settings), None

        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, _no_mask if alike or told else sdpa_mask)
        self.model.set_attn_implementation(NAME)
        try:
            yield
        finally:
            self.model.set_attn_implementation(before)

    def _attended(
        self,
        lengths: Sequence[int],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        settings: dict[str, Any],
    ) -> Tensor:
        """What a part of the attention axis makes of it; one that takes documents apart is given each by itself."""
        attend, groups = self.attend, query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, 1) if groups > 1 else t for t in (key, value))
        if mask is None or len(mask) > 1 or not self.apart:
            return attend(module, query, key, value, mask, settings)
        each = zip(*(t.split(list(lengths), 2) for t in (query, key, value)), strict=True)
        return torch.cat([attend(module, *piece, None, settings) for piece in each], 1)

    def _split(self, positions: int, vocabulary: int, _: str) -> Iterator[slice]:
        """The positions that the head computes at once, of which the second lot stands for all but first and last."""
        each = [*parts_of_head(positions, vocabulary, self.device.type)]
        yield from each[:1]
        if len(each) > 2:
            self.tally.times = len(each) - 2
            yield each[1]
            self.tally.times = 1
        yield from each[1:][-1:]

    def _multiplies_logits(self) -> bool:
        """Whether the model does nothing to its logits but multiply them, and its head does not train."""
        head = self.model.get_output_embeddings()
        if type(head) is not nn.Linear or any(p.requires_grad for p in head.parameters()):
            return False
        seen: list[Any] = []
        handle = head.register_forward_hook(lambda *_: seen.append(len(self.tally.seen)))
        self.tally.seen = []
        try:
            with self._only([]), torch.no_grad():
                self.model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False)
            return not BENDING & set(self.tally.seen[seen[0] :])
        finally:
            handle.remove()


def _no_mask(*_: object, **__: object) -> None:
    """What is causal and nothing else needs none, nor does what is told its documents."""


def _batch(rows: Rows) -> Batch:
    """The tensors that training would give the model."""
    shape = (1, rows.cells) if rows.packed else (len(rows.lengths), max(rows.lengths))
    ids, labels, positions, mask = (torch.zeros(shape, dtype=torch.int64) for _ in range(4))
    return Batch(ids, labels, positions, None if rows.packed else mask, tuple(range(len(rows.lengths))))
