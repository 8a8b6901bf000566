"""Refuse what a model has no positions for, before it is read."""

from transformers import PreTrainedModel

from lora_cli.errors import ExitCode, UserError
from lora_cli.model import max_positions


def check_length(model: PreTrainedModel, prompt: int, answer: int, where: str) -> None:
    """Make sure that a prompt and an answer of so many tokens fit.

    Raises:
        UserError: they do not; names the numbers and, as its place, `where`.
    """
    positions = max_positions(model)
    if positions is not None and prompt + answer > positions:
        what = f"a prompt of {prompt} tokens and an answer of up to {answer} do not fit"
        fix = f"the model reads {positions} tokens: shorten the prompt, or the answer"
        raise UserError(what, where=where, fix=fix, code=ExitCode.DATA)
