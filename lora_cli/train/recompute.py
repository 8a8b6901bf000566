"""Which blocks keep no activations: they are computed again in the backward pass. arXiv:1604.06174"""

from torch import nn
from transformers import PreTrainedModel

from lora_cli.blocks import blocks
from lora_cli.errors import ExitCode, UserError


def keep(model: nn.Module) -> None:
    """Compute nothing again."""
    for module in model.modules():
        if "gradient_checkpointing" in vars(module):
            module.gradient_checkpointing = False  # pyright: ignore[reportArgumentType]


def recompute(model: PreTrainedModel, count: int | None = None) -> None:
    """Compute so many blocks again, from the bottom; default: all.

    From the bottom, because what is computed again there is held only when what the blocks above have kept is gone.

    Raises:
        UserError: the model cannot, or has fewer blocks.
    """
    # transformers renamed the method after 5.17
    name = "activation_checkpointing_enable"
    enable = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(str(error), where="train.gradient_checkpointing", code=ExitCode.MODEL) from error
    if count is None:
        return
    found = blocks(model)
    if count > len(found):
        what, fix = f"{count} blocks are to be computed again, the model has {len(found)}", "true means all"
        raise UserError(what, where="train.gradient_checkpointing", fix=fix, code=ExitCode.MODEL)
    for block in found[count:]:
        block.gradient_checkpointing = False  # pyright: ignore[reportArgumentType]
