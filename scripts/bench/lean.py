"""PEFT in the leanest loop that one would write by hand: no trainer, no logging, logits where they are learned from.

One padded batch a step, SDPA attention, fused AdamW.
"""

from typing import Any

import torch
from peft import PeftModel
from system import IGNORE, MAX_NORM, RATE, Stamps, in_steps, labels, read_job
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM
from transformers.utils import logging


def loss_of(model: Any, step: list[dict[str, list[int]]], device: torch.device) -> Tensor:
    """Mean loss over the labelled tokens of a step."""
    ids = [torch.tensor(row["input_ids"]) for row in step]
    input_ids = pad_sequence(ids, batch_first=True).to(device)
    mask = pad_sequence([torch.ones_like(each) for each in ids], batch_first=True).to(device)
    targets = pad_sequence([torch.tensor(labels(r)) for r in step], True, IGNORE)[:, 1:].to(device)
    hidden = model.model(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
    learned = targets != IGNORE
    return F.cross_entropy(model.lm_head(hidden[:, :-1][learned]).float(), targets[learned])


def main() -> None:
    """Train and report."""
    job, stamps = read_job(), Stamps()
    logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plain: Any = AutoModelForCausalLM.from_pretrained(job.model, attn_implementation="sdpa")
    plain.to(device)
    peft = PeftModel.from_pretrained(plain, job.adapter, is_trainable=True).train()
    model = peft.get_base_model()
    trained = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
    rows = job.read_rows()
    losses = []
    for step in in_steps(rows, job.batch_size):
        loss = loss_of(model, step, device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        stamps.step()
    stamps.losses = [loss.item() for loss in losses]
    stamps.report(rows, job.batch_size)


if __name__ == "__main__":
    main()
