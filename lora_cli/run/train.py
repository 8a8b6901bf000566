"""`lora train`: fine-tune as the recipe says and save the adapter. Read `train` first; the rest are its details."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from lora_cli import io_ops
from lora_cli import model as models
from lora_cli.data.load import Datasets
from lora_cli.errors import ExitCode, UserError
from lora_cli.evaluate.loss import held_out_loss
from lora_cli.model import LanguageModel
from lora_cli.recipe.dump import to_yaml
from lora_cli.recipe.schema import Recipe
from lora_cli.run import prepare, save
from lora_cli.run.folder import RunFolder
from lora_cli.run.stop import stop_signals
from lora_cli.run.trackers import Trackers
from lora_cli.screen import Screen, duration, size
from lora_cli.train import checkpoint
from lora_cli.train.loop import StepReport, Training, token_budget, train_steps


def train(recipe: Recipe, screen: Screen, resume: bool = False) -> Path:
    """Fine-tune as the recipe says; return the folder that holds the adapter.

    Raises:
        UserError: anything the user can mend; whatever was finished before stays on disk.
    """
    prepare.check_method(recipe)
    folder = RunFolder(Path(str(recipe.output.dir)))
    if not resume:
        folder.check_new()
    with folder.held():
        if resume and _is_finished(folder, recipe, screen):
            return folder.adapter
        accelerator = Accelerator()
        language = models.load(recipe.model, accelerator.device)
        datasets = prepare.load_data(recipe, language.tokenizer, prepare.cache_folder(folder.root))
        run = prepare.training(recipe, language, datasets, accelerator)
        io_ops.write_text(folder.recipe, to_yaml(recipe))
        story = Story(recipe, screen, folder, language, datasets, run, Progress())
        story.go_on() if resume else folder.cut_log(0)
        story.announce()
        story.steps()
        return story.finish()


@dataclass
class Progress:
    """What has to be remembered besides the training itself."""

    best_loss: float | None = None
    best_step: int = 0
    worse_in_a_row: int = 0


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
        for problem in problems:
            self.screen.warn(f"skipped a damaged checkpoint: {problem}")
        if path is None and problems:
            what = "no checkpoint is usable"
            raise UserError(what, where=str(self.folder.checkpoints), code=ExitCode.NO_CHECKPOINT)
        if path is not None:
            self.progress = Progress(**checkpoint.restore(path, self.run))
            self.screen.note(f"going on after step {self.run.step}")
        self.folder.cut_log(self.run.step)

    def announce(self) -> None:
        """Say what is about to happen."""
        run, counts = self.run, self.datasets.train.counts
        trained = sum(p.numel() for p in run.adapter.trainable().values())
        total = models.size_of(run.model)
        self.screen.note(
            f"{self.recipe.model.name}: {size(total)} parameters, {size(trained)} trained "
            f"({trained / total:.2%}) in {len(run.adapter.plan.layers)} layers"
        )
        rows = "packed" if run.packing else "padded"
        self.screen.note(
            f"{counts.examples:,} examples, {counts.trained_tokens:,} of {counts.tokens:,} tokens trained; "
            f"{run.total_steps:,} steps of {run.train.batch_size} on {run.accelerator.device}, {rows}"
        )

    def steps(self) -> None:
        """Train to the end, or until stopped."""
        train, run = self.recipe.train, self.run
        trackers = Trackers(run.accelerator, self.recipe, self.folder)
        with self.screen.steps(run.total_steps, run.step, train.log_steps) as shown, stop_signals() as stop:
            for report in train_steps(run):
                shown.show(report)
                self.folder.append(dataclasses.asdict(report))
                trackers.log(report, train.log_steps)
                improved = self.is_due(train.eval_steps, report) and self.evaluate(report, trackers)
                if improved or self.is_due(train.save_steps, report) or stop.asked:
                    self.save_checkpoint()
                stop.leave(run.step, run.total_steps, self.folder.root)
                if self.is_enough():
                    self.screen.note(f"no better eval loss for {self.progress.worse_in_a_row} evaluations")
                    break
        trackers.end()

    def is_due(self, every: int | None, report: StepReport) -> bool:
        """Every so many steps; by default at the end of each epoch; always at the end of the run."""
        every = every or self.run.steps_per_epoch
        return report.step % every == 0 or report.step == self.run.total_steps

    def evaluate(self, report: StepReport, trackers: Trackers) -> bool:
        """Measure the loss on the held-out rows; True when it is the best so far."""
        if self.datasets.eval is None:
            return False
        device = self.run.accelerator.device
        with self.run.computing():
            found = held_out_loss(
                self.run.model,
                self.datasets.eval,
                device=device,
                max_tokens=token_budget(device),
                pad_id=self.run.pad_id,
                rows=self.recipe.eval.max_rows,
            )
        line = {"step": report.step, "epoch": report.epoch, "eval_loss": found.loss}
        self.folder.append(line)
        trackers.log_values({"eval_loss": found.loss}, report.step)
        best = self.progress.best_loss
        improved = best is None or found.loss < best
        self.screen.note(f"step {report.step}  eval loss {found.loss:.4f}{'  (best)' if improved else ''}")
        self.show_samples()
        if improved:
            self.progress = Progress(found.loss, report.step, 0)
        else:
            self.progress.worse_in_a_row += 1
        return improved

    def show_samples(self) -> None:
        """Generate a few answers, so that a person sees what the numbers mean."""
        if self.recipe.eval.samples:
            save.show_samples(self.recipe, self.datasets, self.language, self.screen)

    def is_enough(self) -> bool:
        """Whether early stopping says so."""
        patience = self.recipe.train.early_stopping_patience
        return patience is not None and self.progress.worse_in_a_row >= patience

    def save_checkpoint(self) -> None:
        """Write a checkpoint, then remove old ones."""
        checkpoint.save(self.folder.checkpoints, self.run, dataclasses.asdict(self.progress))
        best = f"step-{self.progress.best_step:06d}"
        checkpoint.rotate(self.folder.checkpoints, self.recipe.train.keep_checkpoints, best)

    def finish(self) -> Path:
        """Save the adapter, with early stopping the best one; prove that it can be read back; draw the loss."""
        if self.recipe.train.early_stopping_patience and self.progress.best_step not in (0, self.run.step):
            best = self.folder.checkpoints / f"step-{self.progress.best_step:06d}"
            checkpoint.restore(best, self.run)
            self.screen.note(f"keeping the adapter of step {self.progress.best_step}, the best one")
        save.adapter(self.folder, self.run, self.recipe, self.language)
        save.plot(self.folder)
        seconds = sum(line.get("seconds", 0.0) for line in self.folder.lines())
        self.screen.note(
            f"trained {self.run.step:,} steps in {duration(seconds)}; adapter in {self.folder.adapter}"
        )
        return self.folder.adapter


def _is_finished(folder: RunFolder, recipe: Recipe, screen: Screen) -> bool:
    """Whether there is nothing left to do; refuses to go on with another recipe than the run was started with."""
    if folder.recipe.exists() and folder.recipe.read_text(encoding="utf-8") != to_yaml(recipe):
        fix = f"go on with the recipe of the run, {folder.recipe}, or start anew with --output"
        raise UserError(
            "the run here has another recipe", where=str(folder.root), fix=fix, code=ExitCode.LOCKED
        )
    if folder.adapter.exists():
        screen.note(f"already finished: {folder.adapter}")
        return True
    return False
