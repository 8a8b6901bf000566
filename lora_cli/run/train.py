"""`lora train`: fine-tune as the recipe says and save the adapter. Read `train` first; the rest are its details."""

import dataclasses
from collections.abc import Collection, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_cli import io_ops
from lora_cli import model as models
from lora_cli.adapter import bits
from lora_cli.adapter.portable import Portable
from lora_cli.data.example import Batch
from lora_cli.data.load import Datasets
from lora_cli.data.pack import nothing
from lora_cli.errors import ExitCode, UserError
from lora_cli.evaluate.loss import HeldOutLoss, row_sums
from lora_cli.model import LanguageModel
from lora_cli.recipe.schema import Recipe
from lora_cli.run import fit, origin, prepare, save
from lora_cli.run.folder import Onlooker, RunFolder
from lora_cli.run.stop import BrokenOff, Stop, stop_signals
from lora_cli.run.trackers import Trackers
from lora_cli.screen import Screen, duration, size
from lora_cli.train import checkpoint
from lora_cli.train.compiled import as_written, explained
from lora_cli.train.exact import exactly
from lora_cli.train.gradient import token_budget
from lora_cli.train.loop import StepReport, Training, train_steps
from lora_cli.train.processes import Processes, joined

MEASURED_TWICE_AS_FAST = 100_000_000
"""Parameters, about those of the smallest model that was measured to gain by bfloat16 on a CPU; tiny ones do not."""


def train(recipe: Recipe, screen: Screen, resume: bool = False, allowed: Collection[str] = ()) -> Path:
    """Fine-tune as the recipe says; return the folder that holds the adapter.

    Args:
        recipe: what to do, checked.
        screen: told how it goes.
        resume: go on with the run in the output folder, if there is one.
        allowed: keys of the recipe whose value, or the files they name, may be others than the run was started with.

    Raises:
        UserError: anything the user can mend; whatever was finished before stays on disk.
    """
    prepare.check_method(recipe)
    recipe = prepare.resolved(recipe)
    with exactly(recipe.train.deterministic), joined() as accelerator:
        processes = Processes(accelerator)
        root = Path(str(recipe.output.dir))
        folder, screen = (RunFolder(root), screen) if processes.leads else (Onlooker(root), Screen.silent())
        if not resume:
            folder.check_new()
        with folder.held(), _nothing_left_behind(folder):
            if processes.told(folder.writes and _is_finished(folder, recipe, screen, allowed)):
                return folder.adapter
            held = _begun_with(folder, recipe, allowed) if folder.writes else None
            language = prepare.load_model(recipe, accelerator)
            cache = prepare.cache_folder(folder.root)
            datasets = processes.first_alone(lambda: prepare.load_data(recipe, language.tokenizer, cache))
            fitting = fit.fitted(recipe, language, datasets, accelerator, screen)
            if quantise := prepare.model_of(recipe).quantize:
                screen.note(f"quantising the base to {quantise}, layer by layer; some starts take minutes")
            run = prepare.training(fitting.recipe, language, datasets, accelerator, screen)
            fitting.apply(run)
            story = Story(recipe, screen, folder, language, datasets, run, Progress())
            story.go_on() if resume else folder.cut_log(0, 0)
            if held is not None:
                origin.write(folder, recipe, held)
            story.announce()
            with explained(recipe.train.compile):
                story.steps()
            return story.finish()


@dataclass
class Progress:
    """What has to be remembered besides the training itself."""

    best_loss: float | None = None
    best_step: int = 0
    worse_in_a_row: int = 0
    evaluated: int = 0
    """Step of the last evaluation."""


@dataclass
class Story:
    """A training run with everything around it: screen, log, evaluations, checkpoints."""

    recipe: Recipe
    screen: Screen
    folder: RunFolder
    language: LanguageModel
    datasets: Datasets
    run: Training
    progress: Progress

    def go_on(self) -> None:
        """Put everything in the state of the newest good checkpoint, if there is one."""
        path, problems = checkpoint.newest(self.folder.checkpoints)
        path = self.run.processes.told(path)
        for problem in problems:
            self.screen.warn(f"skipped a damaged checkpoint: {problem}")
        if path is None and problems:
            what = "no checkpoint is usable"
            raise UserError(what, where=str(self.folder.checkpoints), code=ExitCode.NO_CHECKPOINT)
        if path is None:
            self.screen.note("nothing to go on with here: starting at step 1")
        else:
            self.progress = Progress(**checkpoint.restore(path, self.run))
            self.screen.note(f"going on after step {self.run.step}")
        self.folder.cut_log(self.run.step, self.progress.evaluated)

    def announce(self) -> None:
        """Say what is about to happen."""
        run, counts = self.run, self.datasets.train.counts
        trained = sum(p.numel() for p in run.adapter.trainable().values())
        total = models.size_of(run.model)
        self.screen.note(
            f"{self.recipe.model.name}: {size(total)} parameters, {size(trained)} trained "
            f"({trained / total:.2%}) in {len(run.adapter.plan.layers)} layers"
        )
        base = run.adapter.plan.method.base
        if base is not None:
            count, each = len(run.adapter.plan.quantised), ""
            if self.recipe.model.bits is not None:
                kinds = bits.by_kind(run.model)
                each = f" (bits a weight: {', '.join(f'{kind} {mean:.3g}' for kind, mean in kinds.items())})"
            self.screen.note(
                f"{count} layers in {base.name}{each}; the model takes {size(models.bytes_of(run.model))}B"
            )
        rows = "packed" if run.packing else "padded"
        together = f", {run.processes.size} processes" if run.processes.size > 1 else ""
        self.screen.note(
            f"{counts.examples:,} examples, {counts.trained_tokens:,} of {counts.tokens:,} tokens trained; "
            f"{run.total_steps:,} steps of {run.train.batch_size} on {run.accelerator.device}, {rows}{together}"
        )
        if run.shares is not None:
            held, whole = size(run.shares.held), size(run.shares.whole)
            self.screen.note(f"the base is shared out: {held}B of {whole}B in each process")
        elif run.train.parallel == "fsdp":
            self.screen.note("one process alone keeps the whole base")
        slow = run.precision is torch.float32 and models.multiplies_bfloat16(run.accelerator.device)
        if slow and total >= MEASURED_TWICE_AS_FAST:
            self.screen.note("this CPU is about twice as fast with --set model.dtype=bfloat16")

    def steps(self) -> None:
        """Train to the end, or until stopped."""
        train, run = self.recipe.train, self.run
        trackers = Trackers(self.recipe, self.folder)
        with (
            self.screen.steps(run.total_steps, run.step, train.log_steps) as shown,
            stop_signals(run.shares is None) as stop,
        ):
            if run.step > 0 and self.lacks_evaluation():  # stopped in the middle of it
                self.evaluate(trackers, stop)
            for report in self.left_to_do():
                shown.show(report)
                if report.out_of_memory:
                    self.screen.warn(
                        f"out of memory in step {report.step}: repeated, with {run.at_once} at once"
                    )
                self.folder.append(dataclasses.asdict(report))
                trackers.log(report, train.log_steps)
                improved = self.lacks_evaluation() and self.evaluate(trackers, stop)
                asked = run.processes.any(stop.asked)
                if asked or (improved and train.early_stopping_patience):
                    self.save_checkpoint()
                elif improved or self.is_due(train.save_steps):
                    self.try_checkpoint()
                if asked and (run.step < run.total_steps or self.lacks_evaluation()):
                    if not self.folder.writes:
                        raise SystemExit(ExitCode.INTERRUPTED)  # the process that writes says so
                    stop.leave(run.step, run.total_steps, self.folder.root)
                if self.is_enough():
                    self.screen.note(f"no better eval loss for {self.progress.worse_in_a_row} evaluations")
                    break
        trackers.end()

    def left_to_do(self) -> Iterator[StepReport]:
        """The steps to the end; none when early stopping said so just before the run was killed."""
        return iter(()) if self.is_enough() else train_steps(self.run)

    def is_due(self, every: int | None) -> bool:
        """Every so many steps; by default at the end of each epoch; always at the end of the run."""
        every = every or self.run.steps_per_epoch
        return self.run.step % every == 0 or self.run.step == self.run.total_steps

    def lacks_evaluation(self) -> bool:
        """Whether the held-out rows are to be measured after this step, and were not yet."""
        wanted = self.datasets.eval is not None and self.is_due(self.recipe.train.eval_steps)
        return wanted and self.progress.evaluated != self.run.step

    def evaluate(self, trackers: Trackers, stop: Stop) -> bool:
        """Measure the loss on the held-out rows, unless somebody asks to stop; True when it is the best so far."""
        with as_written(self.recipe.train.compile):
            found = self.held_out_loss(stop)
        if found is None:
            return False
        step, best = self.run.step, self.progress.best_loss
        self.folder.append({"step": step, "epoch": step / self.run.steps_per_epoch, "eval_loss": found.loss})
        trackers.log_values({"eval_loss": found.loss}, step)
        improved = best is None or found.loss < best
        self.screen.note(f"step {step}  eval loss {found.loss:.4f}{'  (best)' if improved else ''}")
        if improved:
            self.progress = Progress(found.loss, step, 0, step)
        else:
            self.progress.worse_in_a_row, self.progress.evaluated = self.progress.worse_in_a_row + 1, step
        if self.recipe.eval.samples:
            with as_written(self.recipe.train.compile):
                stop.unless_asked(self.show_samples)
            self.run.processes.wait()
        return improved

    def held_out_loss(self, stop: Stop) -> HeldOutLoss | None:
        """On the rows that are not learned from; None when somebody asks to stop, in whichever process."""
        assert self.datasets.eval is not None
        sums, processes = stop.unless_asked(lambda: self.held_out_sums(stop)), self.run.processes
        if processes.any(sums is None) or sums is None:
            return None
        if processes.size > 1:
            on_device = sums.to(self.run.accelerator.device)
            processes.sum([on_device])
            sums = on_device.cpu()
        return HeldOutLoss.of(sums, self.datasets.eval)

    def held_out_sums(self, stop: Stop) -> Tensor:
        """What that loss is made of: the share of this process, as many rows at once as training had memory for."""
        assert self.datasets.eval is not None
        device = self.run.accelerator.device
        with self.run.computing():
            return row_sums(
                self.run.model,
                self.datasets.eval,
                device=device,
                max_tokens=self.run.max_tokens or token_budget(device),
                pad_id=self.run.pad_id,
                rows=self.recipe.eval.max_rows,
                share=lambda batches: self.mine(batches, stop),
            )

    def mine(self, batches: list[Batch], stop: Stop) -> Iterator[Batch]:
        """The share of this process. Where they gather the base together, all have as many, and stop after the same."""
        processes = self.run.processes
        if self.run.shares is None:
            yield from processes.share(batches)
            return
        for batch in processes.share_evenly(batches, nothing(self.run.pad_id)):
            if processes.any(stop.asked):
                raise BrokenOff
            yield batch

    def show_samples(self) -> None:
        """Generate a few answers, so that a person sees what the numbers mean; where it takes all of them, together."""
        if self.folder.writes or self.run.shares is not None:
            save.show_samples(self.recipe, self.datasets, self.language, self.screen)

    def is_enough(self) -> bool:
        """Whether early stopping says so."""
        patience = self.recipe.train.early_stopping_patience
        return patience is not None and self.progress.worse_in_a_row >= patience

    def try_checkpoint(self) -> None:
        """Write a checkpoint; a full disk does not stop the run, because the next one makes up for it."""
        try:
            self.save_checkpoint()
        except UserError as error:
            if error.code is not ExitCode.DISK:
                raise
            self.screen.warn(f"step {self.run.step} is not saved, training goes on: {error}")

    def save_checkpoint(self) -> None:
        """Write a checkpoint and the log that belongs to it, then remove old ones.

        Raises:
            UserError: the disk refuses; the checkpoints before are untouched.
        """
        if not self.folder.writes:
            return
        self.folder.flush_log()
        checkpoint.save(self.folder.checkpoints, self.run, dataclasses.asdict(self.progress))
        best = f"step-{self.progress.best_step:06d}"
        checkpoint.rotate(self.folder.checkpoints, self.recipe.train.keep_checkpoints, best)

    def finish(self) -> Path:
        """Draw the loss; save the adapter, with early stopping the best one, and prove that it can be read back."""
        if self.recipe.train.early_stopping_patience and self.progress.best_step not in (0, self.run.step):
            best = self.folder.checkpoints / f"step-{self.progress.best_step:06d}"
            checkpoint.restore(best, self.run)
            self.screen.note(f"keeping the adapter of step {self.progress.best_step}, the best one")
        form = save.form(self.run)
        if self.folder.writes:
            self.save(form)
        return self.folder.adapter

    def save(self, form: Portable) -> None:
        """The picture, and the adapter last: where it is, nothing is left to do."""
        try:
            save.plot(self.folder)
        except UserError as error:
            self.screen.warn(str(error))
        save.adapter(self.folder, self.run, self.recipe, self.language, form)
        seconds = sum(line.get("seconds", 0.0) for line in self.folder.lines())
        sent, steps = self.run.processes.sent, max(self.run.step, 1)
        share = f"; each process sent {size(sent / steps)}B a step" if sent else ""
        if self.run.shares is not None:
            share += f" and was sent {size(self.run.shares.gathering.received / steps)}B of the base"
        self.screen.note(
            f"trained {self.run.step:,} steps in {duration(seconds)}; adapter in {self.folder.adapter}{share}"
        )


@contextmanager
def _nothing_left_behind(folder: RunFolder) -> Generator[None]:
    """What ends a run that has not begun leaves nothing of it; a stop outside of the steps says what there is.

    Raises:
        UserError: somebody has asked to stop, whatever a library made of it.
    """
    try:
        yield
    except BaseException as error:
        stopped, begun = _is_stop(error), folder.holds_steps
        if not begun and (stopped or not folder.recipe.exists()):
            folder.clear()
        if not stopped:
            raise
        what, fix = "stopped before the first step; nothing to resume", "the same command starts anew"
        if begun:
            what, fix = "stopped; what was saved is untouched", "the same command with --resume goes on"
        raise UserError(what, where=str(folder.root), fix=fix, code=ExitCode.INTERRUPTED) from error


def _is_stop(error: BaseException | None) -> bool:
    """Whether this is a signal's KeyboardInterrupt, or what was made of one."""
    return error is not None and (isinstance(error, KeyboardInterrupt) or _is_stop(error.__context__))


def _begun_with(folder: RunFolder, recipe: Recipe, allowed: Collection[str]) -> origin.Contents:
    """Make the folder ready; refuses other files than the run was started with."""
    io_ops.make_folder(folder.checkpoints)
    io_ops.check_writable(folder.checkpoints)
    held = origin.contents(recipe)
    origin.check_contents(folder, held, allowed)
    return held


def _is_finished(folder: RunFolder, recipe: Recipe, screen: Screen, allowed: Collection[str]) -> bool:
    """Whether there is nothing left to do; refuses to go on with another recipe than the run was started with."""
    finished = folder.adapter.exists()
    origin.check_recipe(folder, recipe, () if finished else allowed)
    if finished:
        screen.note(f"already finished: {folder.adapter}")
    return finished
