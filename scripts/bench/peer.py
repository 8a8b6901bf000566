"""TRL's SFTTrainer over PEFT on a job; peer_default.py and peer_tuned.py say with which settings."""

import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from system import MAX_NORM, RATE, SEED, Job, Stamps, labels
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer


class Stamped(SFTTrainer):
    """The trainer, with its losses noted: a number a micro-batch, each already a share of its step's."""

    noted: list[torch.Tensor]

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Note the loss."""
        loss = super().training_step(*args, **kwargs)
        self.noted.append(loss)
        return loss


class AtStepEnd(TrainerCallback):
    """Stamps each optimizer step."""

    def __init__(self, stamps: Stamps) -> None:
        """Where to."""
        self.stamps = stamps

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """An optimizer step is done."""
        self.stamps.step()


def run(job: Job, rows: list[dict[str, list[int]]], settings: dict[str, Any]) -> None:
    """Train on `rows` with `settings` on top of what all systems have in common; report."""
    stamps = Stamps()
    dataset = Dataset.from_list([{"input_ids": row["input_ids"], "labels": labels(row)} for row in rows])
    plain = AutoModelForCausalLM.from_pretrained(job.model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Stamped(
            model=PeftModel.from_pretrained(plain, job.adapter, is_trainable=True),
            args=config(job, folder, settings),
            train_dataset=dataset,
            processing_class=AutoTokenizer.from_pretrained(job.model),
            callbacks=[AtStepEnd(stamps)],
        )
        trainer.noted = []
        trainer.train()
    parts = len(trainer.noted) // job.steps
    noted = [loss.item() for loss in trainer.noted]
    stamps.losses = [sum(noted[at : at + parts]) for at in range(0, len(noted), parts)]
    stamps.report(rows, job.batch_size)


def config(job: Job, folder: str, settings: dict[str, Any]) -> SFTConfig:
    """Only what makes the task the same one, then `settings`."""
    common = {
        "output_dir": folder,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_steps": job.steps,
        "per_device_train_batch_size": job.batch_size,
        "train_sampling_strategy": "sequential",
        "max_length": None,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": MAX_NORM,
        "seed": SEED,
    }
    return SFTConfig(**{**common, **settings})
