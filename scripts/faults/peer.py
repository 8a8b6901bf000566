"""transformers' Trainer with PEFT, and TRL's SFTTrainer with PEFT, on a task; started in .bench-venv.

The defaults set only what makes the task the same one.
"""

import contextlib
import io
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, ScriptArguments, TrlParser
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from scripts.faults.server import serve
from scripts.faults.task import ALPHA, BEST, BEST_OF_TRL, SEED, R, Task

INCOMPLETE = "checkpoint-is-incomplete.txt"


def arguments_of(task: Task, system: str) -> dict[str, Any]:
    """The task as their arguments."""
    known: dict[str, Any] = {
        "output_dir": task.out,
        "max_steps": task.steps,
        "save_steps": task.save_steps,
        "per_device_train_batch_size": task.at_once,
        "gradient_accumulation_steps": task.batch_size // task.at_once,
        "learning_rate": task.learning_rate,
        "seed": SEED,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    if system.startswith("sft"):
        known["max_length"] = task.max_length
    if system.endswith("best"):
        known |= BEST | (BEST_OF_TRL if system.startswith("sft") else {})
    return {**known, **task.extra}


def become(system: str, task: Task) -> None:
    """Do the task."""
    if task.configs:
        read(system, task)
    else:
        train(system, task)


def train(system: str, task: Task) -> None:
    """Go on from the last checkpoint, if there is one; save the adapter at the end."""
    trainer = sft(system, task) if system.startswith("sft") else plain(system, task)
    trainer.train(resume_from_checkpoint=last_checkpoint(task.out, system.endswith("best")))
    if trainer.state.global_step < task.steps:  # stopped by a signal, and saved
        sys.exit(75)
    trainer.save_model(f"{task.out}/final")


def last_checkpoint(out: str, best: bool) -> str | None:
    """As the example scripts look for it; the best setting passes over what is marked as incomplete."""
    if not Path(out).is_dir():
        return None
    if best:
        for mark in Path(out).glob(f"checkpoint-*/{INCOMPLETE}"):
            mark.parent.rename(mark.parent.with_name(f"incomplete-{mark.parent.name}"))
    return get_last_checkpoint(out)


def sft(system: str, task: Task) -> Trainer:
    """TRL loads the model and prepares the rows itself."""
    rows = load_dataset("json", data_files=task.rows, split="train")
    settings = SFTConfig(**arguments_of(task, system))
    return SFTTrainer(model=task.model, args=settings, train_dataset=rows, peft_config=lora(task))


def plain(system: str, task: Task) -> Trainer:
    """The Trainer gets tokens, cut to the length in the usual way, and a model that is already adapted."""
    settings = TrainingArguments(**arguments_of(task, system))
    tokenizer = AutoTokenizer.from_pretrained(task.model)

    def tokenised(row: dict[str, str]) -> dict[str, list[int]]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = prompt + tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        labels = [-100] * len(prompt) + ids[len(prompt) :]
        return {"input_ids": ids[: task.max_length], "labels": labels[: task.max_length]}

    rows = load_dataset("json", data_files=task.rows, split="train")
    rows = rows.map(tokenised, remove_columns=rows.column_names)
    set_seed(SEED)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(task.model), lora(task))
    return Trainer(
        model=model,
        args=settings,
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )


def lora(task: Task) -> LoraConfig:
    """The adapter."""
    return LoraConfig(
        r=R,
        lora_alpha=ALPHA,
        lora_dropout=task.dropout,
        target_modules=[*task.targets] or "all-linear",
        task_type="CAUSAL_LM",
    )


def read(system: str, task: Task) -> None:
    """Read the configurations as their own command lines do; one line of JSON each."""
    if system.startswith("sft"):
        parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig))
    else:
        parser = HfArgumentParser(TrainingArguments)
    for path in task.configs:
        heard = io.StringIO()
        try:
            with contextlib.redirect_stderr(heard), contextlib.redirect_stdout(heard):
                if isinstance(parser, TrlParser):
                    parser.parse_args_and_config(["--config", path])
                else:
                    parser.parse_yaml_file(path)
            ended = ["read", ""]
        except SystemExit:
            ended = ["refused", heard.getvalue()]
        except BaseException as error:
            ended = ["traceback", "".join(traceback.format_exception_only(error))]
        print(json.dumps(ended))


def main() -> None:
    """Load everything, then answer."""
    torch.set_num_threads(1)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)), LoraConfig(r=1))
    serve(become)


if __name__ == "__main__":
    main()
