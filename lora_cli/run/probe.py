"""What a model computes for a few rows, in float32, to compare it with what another one computes."""

import math
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from lora_cli.data.load import load_format
from lora_cli.data.source import read_rows
from lora_cli.data.tokens import encode
from lora_cli.errors import UserError
from lora_cli.evaluate.mode import evaluating
from lora_cli.model import LanguageModel
from lora_cli.recipe.schema import Recipe

MAX_ROWS, MAX_TOKENS = 8, 48
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "In 1905 four papers appeared: on light, on moving bodies, on heat, and on mass.",
    "¿Dónde está la biblioteca? Там, за углом. 図書館は角を曲がったところです。",
)


def rows_for(language: LanguageModel, recipe: Recipe | None) -> list[Tensor]:
    """Ids [1, length] of the recipe's held-out or training rows, or of fixed texts where these cannot be read.

    The ids of added tokens are a row of their own.
    """
    ids = _recipe_rows(recipe, language.tokenizer) or encode(language.tokenizer, *TEXTS)
    rows = [row[:MAX_TOKENS] for row in (*ids, language.new_rows) if row]
    return [torch.tensor([row]) for row in rows]


def logits(model: nn.Module, rows: list[Tensor]) -> Tensor:
    """Logits [positions of all rows, vocabulary], float32, on the CPU."""
    device = next(model.parameters()).device
    with evaluating(model), torch.autocast(device.type, enabled=False), InFloat32():
        found = [model(input_ids=row.to(device), use_cache=False).logits[0].cpu() for row in rows]
    return torch.cat(found)


def distance(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖; infinite where the shapes differ."""
    if found.shape != expected.shape:
        return math.inf
    return (torch.linalg.norm(found - expected) / torch.linalg.norm(expected)).item()


class InFloat32(TorchFunctionMode):
    """Inside the block every operation sees 16-bit tensors as float32, so that a model computes in float32.

    The model's weights stay as they are stored; one operand at a time is widened.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Widen what goes in."""
        args, kwargs = tree_map(_widened, (args, kwargs or {}))
        return function(*args, **kwargs)


def _widened(value: Any) -> Any:
    narrow = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if narrow else value


def _recipe_rows(recipe: Recipe | None, tokenizer: Any) -> list[tuple[int, ...]]:
    """The first rows as the adapter saw them; empty where the data is not here any more."""
    if recipe is None:
        return []
    data = recipe.data
    try:
        form = load_format(data, tokenizer)
        rows = read_rows(data.train, "train") if data.eval is None else read_rows(data.eval, "eval")
        examples = chain.from_iterable(form.examples(row) for _, row in rows)
        return [example.input_ids for example in islice(examples, MAX_ROWS)]
    except UserError:
        return []
