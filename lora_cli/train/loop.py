"""The training loop as a generator: it yields a report after each optimizer step, the caller decides what to do.

There is no hidden state: the rows of a step follow from (seed, step), dropout from (seed, step, micro-batch), the
learning rate from step. That is what makes going on from a checkpoint exact.
"""

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from lora_cli import parts
from lora_cli.adapter.inject import Adapter, tensors_of
from lora_cli.adapter.lifecycle import Lifecycle
from lora_cli.data.cache import Examples
from lora_cli.data.example import Batch
from lora_cli.data.pack import micro_batches
from lora_cli.errors import ExitCode, UserError, some_of
from lora_cli.model import computing
from lora_cli.recipe.schema import TrainRecipe
from lora_cli.train import optim
from lora_cli.train.course import Course
from lora_cli.train.gradient import accumulate, accumulate_outer, seed_of, token_budget, unconnected
from lora_cli.train.loss import Loss
from lora_cli.train.measure import mean_loss, measure
from lora_cli.train.processes import Processes
from lora_cli.train.sharding import Shares
from lora_cli.train.twice import Twice

WATCHED_STEPS = 20
"""A tensor whose gradient was zero in all of the first so many steps is not connected to the loss."""


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did. Losses are per trained token, in nats."""

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    tokens: int
    """Read in this step, padding not counted."""
    trained_tokens: int
    seconds: float
    tokens_per_second: float
    memory_bytes: int
    """Peak so far: of the GPU if there is one, else of the process."""
    out_of_memory: bool
    """Its rows did not fit; it was repeated, and from now on fewer are computed at once."""


@dataclass
class Training:
    """Everything that the loop works on."""

    model: PreTrainedModel
    adapter: Adapter
    examples: Examples
    optimizer: Optimizer
    train: TrainRecipe
    accelerator: Accelerator
    precision: torch.dtype
    packing: bool
    pad_id: int
    shares: Shares | None = None
    """Where the base is shared out among the processes."""
    step: int = 0
    """Optimizer steps done."""
    max_tokens: int | None = None
    """Of a micro-batch; under `micro_batch_size: auto`."""
    max_rows: int | None = None
    """Of a micro-batch; where the recipe sets it."""
    say: Callable[[str], None] = lambda text: None
    """Tells whoever watches what takes long."""

    def __post_init__(self) -> None:
        """Ask the parts what they need before the first step."""
        self.processes = Processes(self.accelerator)
        if self.train.micro_batch_size == "auto":
            self.max_tokens = token_budget(self.accelerator.device)
        else:
            self.max_rows = self.train.micro_batch_size
        self.check_held()
        # Of torch, not of accelerate: its fp16 exists on GPUs only, and its state has to be in our checkpoints.
        self.scaler = torch.amp.GradScaler(
            self.accelerator.device.type, enabled=self.precision is torch.float16
        )
        method = self.adapter.plan.method
        chosen = [("rank", method.rank), *(("lifecycle", part) for part in method.lifecycle)]
        self.lifecycles: tuple[Lifecycle, ...] = tuple(
            parts.load(axis, part.name).make(**parts.settings(axis, part)) for axis, part in chosen
        )
        self.processes.start_alike([*self.adapter.named_tensors().values()])
        self.split = cache(self.course.split)
        for lifecycle in self.lifecycles:
            lifecycle.setup(self)
        with self.computing():
            self.loss = Loss.of(self.model)
        self.watched = [*self.adapter.trainable()]
        """By name; some of them may be frozen on the way, or give way to others."""
        self.connected = torch.zeros(len(self.watched), dtype=torch.bool)
        self.skipped = 0
        """Steps skipped because a gradient overflowed in float16; the scaler lowers its factor and goes on."""

    def check_held(self) -> None:
        """A tensor that trains but has no optimizer would silently stay as it is; so would one that was frozen."""
        self.trained = self.adapter.trainable()
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if held == {id(p) for p in self.trained.values()}:
            return
        lost = [name for name, p in self.trained.items() if id(p) not in held]
        frozen = {*self.adapter.named_tensors()} - {*self.trained}
        raise AssertionError(f"not in the optimizer: {lost}; in it, but frozen: one of {frozen}")

    def computing(self) -> AbstractContextManager[Any]:
        """Context in which the model computes in the recipe's precision."""
        return computing(self.model, self.precision)

    @cached_property
    def course(self) -> Course:
        """Epochs over all examples."""
        return Course(self.examples, self.train.seed, self.train.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        """Of all examples, whether or not some are held out for the method."""
        return self.course.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Optimizer steps from beginning to end."""
        if self.train.max_steps is not None:
            return self.train.max_steps
        return math.ceil((self.train.epochs or 1) * self.steps_per_epoch)

    def rows(self, step: int) -> list[int]:
        """The examples that step 0, 1, ... learns from."""
        held_out = self.held_out(step)
        return (self.split(held_out)[0] if held_out else self.course).rows(step)

    def outer_rows(self, step: int) -> list[int]:
        """The examples of a step for what learns from held-out ones: as many, in epochs of their own."""
        return self.split(self.held_out(step))[1].rows(step)

    def held_out(self, step: int) -> int:
        """How many examples the method keeps from this step."""
        return max(lifecycle.held_out(len(self.examples), step) for lifecycle in self.lifecycles)

    @property
    def at_once(self) -> str:
        """The largest micro-batch, in words."""
        return f"{self.max_rows} rows" if self.max_tokens is None else f"{self.max_tokens:,} tokens"

    @property
    def adds_in_order(self) -> bool:
        """Whether micro-batches are added up in the order that one process would add them up in."""
        return self.train.deterministic and self.processes.size > 1

    @property
    def tokens(self) -> int:
        """Read in the step at hand by all processes, padding not counted."""
        return int(self.examples.lengths[self.rows(self.step)].sum())

    @property
    def trained_tokens(self) -> int:
        """Learned in the step at hand, by all processes."""
        return int(self.examples.trained_counts[self.rows(self.step)].sum())

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Sum over the processes, in place."""
        self.processes.sum(tensors)

    def second_passes(self) -> Callable[[Batch], Tensor]:
        """Watch the passes from now on; what comes back takes one more, and says how far apart the two are."""
        twice = Twice(self.model, self.computing)
        return lambda batch: twice.divergence(self.loss, batch)

    def measure(self, kind: str) -> dict[str, Tensor]:
        """What an init asks for, on the rows of the next step."""
        # In all processes alike, should anything be dropped.
        torch.manual_seed(seed_of(self.train.seed, self.step))
        found = measure(
            kind,
            self.model,
            {name: layer.base for name, layer in self.adapter.layers.items()},
            self.examples,
            self.rows(self.step),
            precision=self.precision,
            pad_id=self.pad_id,
        )
        self.processes.start_alike([*found.values()])  # who decides by them decides the same everywhere
        return found

    def held_out_loss(self) -> Tensor:
        """Per trained token, on all that the method keeps from the next step; nothing is dropped."""
        outer = self.split(self.held_out(self.step))[1].among
        assert outer is not None, "the method holds some out"
        batches = micro_batches(
            self.examples,
            outer.tolist(),
            max_tokens=self.max_tokens,
            max_rows=self.max_rows,
            packing=self.packing,
            pad_id=self.pad_id,
        )
        found = mean_loss(self.model, self.loss, batches, self.precision)
        self.processes.start_alike([found])  # as above
        return found


def train_steps(run: Training) -> Iterator[StepReport]:
    """Train from `run.step` to the end, yielding after each optimizer step.

    Raises:
        UserError: a loss or gradient is not finite (nothing has been updated by it), or nothing is learned.
    """
    while run.step < run.total_steps:
        yield _step(run, run.rows(run.step))
    for lifecycle in run.lifecycles:
        lifecycle.finish(run)
    _check_connected(run, run.step)


def _step(run: Training, rows: list[int]) -> StepReport:
    """One optimizer step on these rows."""
    began = time.perf_counter()
    run.check_held()
    rate = optim.learning_rate(run.step, run.total_steps, run.train)
    rate *= math.prod(lifecycle.rate(run.step) for lifecycle in run.lifecycles)
    optim.set_learning_rate(run.optimizer, rate)
    trained_tokens = int(run.examples.trained_counts[rows].sum())
    at_once = run.at_once
    batches, losses, loss = accumulate(run, rows, trained_tokens)
    outer = {name for lifecycle in run.lifecycles for name in lifecycle.outer(run)}
    if outer:
        others = run.outer_rows(run.step)
        more = accumulate_outer(run, others, outer)
        batches, losses, rows = batches + more[0], losses + more[1], rows + others
    _penalise(run)
    loss, grad_norm = _finished(run, loss, rate)
    _check_finite(run, loss, grad_norm, losses, batches)
    _update(run, grad_norm)
    run.step += 1
    for lifecycle in run.lifecycles:
        lifecycle.stepped(run)
    run.optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - began
    tokens = int(run.examples.lengths[rows].sum())
    return StepReport(
        step=run.step,
        epoch=run.step / run.steps_per_epoch,
        loss=loss,
        learning_rate=rate,
        grad_norm=grad_norm,
        tokens=tokens,
        trained_tokens=trained_tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        memory_bytes=peak_memory(run.accelerator.device),
        out_of_memory=run.at_once != at_once,
    )


def _penalise(run: Training) -> None:
    """Add the gradient of what the lifecycle puts on top of the loss, once a step; it has no share in the report."""
    for lifecycle in run.lifecycles:
        penalty = lifecycle.penalty(run)
        if penalty is not None:
            run.scaler.scale(penalty).backward()


def _finished(run: Training, loss: Tensor, rate: float) -> tuple[float, float]:
    """Let the parts have their say; returns the loss and the norm of the gradients."""
    run.scaler.unscale_(run.optimizer)
    watched = run.step < WATCHED_STEPS and rate != 0
    if watched:
        _note_gradients(
            run
        )  # some parts take gradients back (DyLoRA), others make them (the optimizer's view)
    for lifecycle in run.lifecycles:
        lifecycle.gradients(run)
    if watched:
        _watch(run)
    gradients = [p.grad for p in run.trained.values() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    both = torch.stack([loss.float(), norm.float().to(loss.device)]).tolist()  # the step's only wait
    return both[0], both[1]


def _check_finite(
    run: Training, loss: float, grad_norm: float, losses: list[Tensor], batches: list[Batch]
) -> None:
    """Stop before anything that is not a number reaches the weights."""
    if math.isfinite(loss) and (math.isfinite(grad_norm) or _is_overflow(run)):
        return
    what = "loss" if not math.isfinite(loss) else "gradient"
    bad = [batch for batch, part in zip(batches, losses, strict=True) if not torch.isfinite(part)]
    rows = run.processes.all_of([run.examples[row].where for batch in bad for row in batch.rows])
    rows = rows or run.processes.all_of([run.examples[row].where for batch in batches for row in batch.rows])
    raise UserError(
        f"the {what} is not a finite number in step {run.step + 1}; no weight was changed by it",
        where=f"rows {some_of(rows)}",
        fix="lower train.learning_rate, or look at these rows; the last checkpoint is good",
        code=ExitCode.NON_FINITE,
    )


def check_weights(run: Training) -> None:
    """Refuse what an update has made infinite: nobody could go on from it, or use it.

    Raises:
        UserError: naming a tensor.
    """
    bad = [name for name, tensor in tensors_of(run.adapter).items() if not torch.isfinite(tensor).all()]
    if bad:
        raise UserError(
            f"the trained weights are not finite numbers after step {run.step}, and are not saved",
            where=some_of(bad),
            fix="lower train.learning_rate; the last checkpoint is good",
            code=ExitCode.NON_FINITE,
        )


def _is_overflow(run: Training) -> bool:
    """In float16 a scaled gradient may overflow; once the scale is down to 1 it is not the scale's fault."""
    return run.scaler.is_enabled() and run.scaler.get_scale() >= 1


def _update(run: Training, grad_norm: float) -> None:
    """Clip and step."""
    parameters = list(run.trained.values())
    limit = run.train.max_grad_norm
    if limit is not None and math.isfinite(grad_norm):
        norm = torch.tensor(grad_norm, device=parameters[0].device)
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.skipped += not math.isfinite(grad_norm)


def _watch(run: Training) -> None:
    """Remember which tensors have had a gradient, or were held back; complain when some never had one."""
    run.connected |= _note_gradients(run)
    if run.step + 1 == WATCHED_STEPS:
        _check_connected(run, WATCHED_STEPS)


def _note_gradients(run: Training) -> Tensor:
    """Remember which tensors have a gradient now; returns which of the watched ones have none to look at."""
    gradients = [run.trained[name].grad if name in run.trained else None for name in run.watched]
    norms = [torch.linalg.vector_norm(g) for g in gradients if g is not None]
    missing = torch.tensor([g is None for g in gradients])
    if norms:
        run.connected[~missing] |= (torch.stack(norms) != 0).cpu()
    return missing


def _check_connected(run: Training, steps: int) -> None:
    """Complain when nothing was learned in `steps` steps, or some tensor had no gradient in the watched ones."""
    if run.skipped and run.skipped == run.step:
        what, fix = (
            "every step overflowed in float16",
            "train longer, or set train.precision: bfloat16 or float32",
        )
        raise UserError(what, where="train.precision", fix=fix, code=ExitCode.LEARNED_NOTHING)
    seen = dict(zip(run.watched, run.connected.tolist(), strict=True))
    dead = [name for name, ok in seen.items() if not ok]
    if steps < WATCHED_STEPS and any(seen.values()):
        dead = _of_dead_layers(run, dead)
    if dead and run.train.learning_rate > 0:
        raise unconnected(run, dead, min(steps, WATCHED_STEPS))


def _of_dead_layers(run: Training, dead: list[str]) -> list[str]:
    """What a short run proves: the factor beside a zero one has its first gradient in step 2, the other in step 1."""
    shared = {id(p) for p in run.adapter.shared.values()}
    layers = (
        [f"{name}.{key}" for key, p in layer.own_tensors().items() if p.requires_grad and id(p) not in shared]
        for name, layer in run.adapter.layers.items()
    )
    return [name for names in layers if set(names) <= set(dead) for name in names]


def peak_memory(device: torch.device) -> int:
    """Bytes at the highest point so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
