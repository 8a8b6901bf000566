"""Cross entropy summed over the trained tokens; logits are computed at their positions only."""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lora_cli.data.example import IGNORE, Batch


def loss_sum(model: PreTrainedModel, batch: Batch, device: torch.device) -> Tensor:
    """−Σ log p(token) over the batch's trained tokens, float32; the caller divides by their number.

    Summing first and dividing once by the number of trained tokens of the whole optimizer step makes the result
    independent of how the step is split into micro-batches.
    """
    logits, targets = trained_logits(model, batch, device)
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def trained_logits(model: PreTrainedModel, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits [n, vocabulary] where the next token is trained, and those tokens [n], rows of the batch in order."""
    following = batch.labels[:, 1:]
    positions = _before_trained(
        batch
    )  # found on the CPU: on a GPU, asking how many there are would wait for it
    targets = following[following != IGNORE].to(device, non_blocking=True)
    moved = batch.to(device)
    with head_sees(model, positions.to(device, non_blocking=True)):
        output = model(
            input_ids=moved.input_ids,
            attention_mask=moved.attention_mask,
            position_ids=moved.position_ids,
            use_cache=False,
        )
    return output.logits, targets


def _before_trained(batch: Batch) -> Tensor:
    """Indices into the flattened batch of the positions whose next token is trained."""
    trained = F.pad(batch.labels[:, 1:] != IGNORE, (0, 1))
    return trained.flatten().nonzero().squeeze(1)


@contextmanager
def head_sees(model: PreTrainedModel, positions: Tensor) -> Generator[None]:
    """Inside the block the output head reads only these positions.

    The model's own forward stays in charge of what surrounds the head (soft-caps, logit scales), so the loss is
    the model's own whatever the architecture; PyTorch's forward pre-hook is how a caller may change an input.
    """

    def select(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].flatten(0, -2).index_select(0, positions),)

    head = model.get_output_embeddings()
    assert head is not None, "a causal language model has an output head"
    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
