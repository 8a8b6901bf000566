"""General text, which training has nothing to do with: what a model forgets shows in its loss there."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lora_cli.data.columns import read_text
from lora_cli.data.example import Example
from lora_cli.data.row import wrong
from lora_cli.data.source import read_rows
from lora_cli.data.tokens import encode, leading
from lora_cli.recipe.schema import WeightedSource

WINDOW = 512
"""Most tokens in one piece of a document."""


def pieces(
    file: str, tokenizer: PreTrainedTokenizerBase, positions: int | None, rows: int | None
) -> list[Example]:
    """The documents of a file in pieces of at most `WINDOW` tokens, every token learned but the first.

    No end token: fine-tuning on short answers makes it more probable everywhere, which is nothing remembered.

    Args:
        file: rows with a column `text`, or a text file with a document per paragraph.
        tokenizer: the model's.
        positions: the longest sequence that the model reads.
        rows: use only the first so many; None: all.

    Raises:
        UserError: the file is missing or wrong, or has no text to predict.
    """
    front = leading(tokenizer)
    size = min(WINDOW, positions or WINDOW) - len(front)
    found: list[Example] = []
    for number, (_, row) in enumerate(read_rows((WeightedSource(path=file),), "eval")):
        if number == rows:
            break
        (ids,) = encode(tokenizer, read_text(row).text)
        for start in range(0, len(ids), size):
            piece = front + ids[start : start + size]
            if len(piece) > 1:
                found.append(Example(piece, (False,) + (True,) * (len(piece) - 1), row.where))
    if not found:
        raise wrong("holds no text to predict", str(Path(file)), "eval.forgetting wants plain text")
    return found
