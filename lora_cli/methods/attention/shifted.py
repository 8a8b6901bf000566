"""shifted: a token sees its own group only; for half of the heads the groups lie half a group further. arXiv:2309.12307

S²-Attn of LongLoRA. Each document is cut into `groups` groups, so attention costs that many times less. What a token
sees lies in its own document and never behind it: the official code rolls the tokens and with them the end of the
document round to its beginning; here the first half group of the shifted heads is a group of its own. In evaluation
attention is full.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from lora_cli.attention import documents
from lora_cli.recipe.schema import Section

APART = True
"""Each document of a packed row is computed as if it were alone."""


class Settings(Section):
    """Settings in a recipe: `{shifted: {groups: 4}}`."""

    groups: Annotated[int, Field(ge=1)] = Field(
        default=4, description="Groups that a document is cut into; 1: full attention."
    )


def make(model: nn.Module, groups: int) -> Callable[..., Tensor]:
    """Attention in groups."""

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        settings: dict[str, Any],
    ) -> Tensor:
        how = {"scale": settings.get("scaling"), "dropout_p": settings.get("dropout", 0.0)}
        tokens, half = query.shape[2], query.shape[1] // 2
        lengths = None if mask is None else documents(mask)
        itself = torch.eye(tokens, dtype=torch.bool, device=query.device)
        found: list[Tensor] = []
        for heads, shifted in ((slice(0, half), False), (slice(half, None), True)):
            q, k, v = query[:, heads], key[:, heads], value[:, heads]
            if mask is not None and lengths is None:
                # Of padding each token sees itself, because what sees nothing is no number.
                seen = (mask & grouped(mask, groups, shifted)) | itself
                found.append(F.scaled_dot_product_attention(q, k, v, seen, **how))
                continue
            sizes = [size for length in lengths or [tokens] for size in cut(length, groups, shifted)]
            pieces = zip(*(t.split(sizes, 2) for t in (q, k, v)), strict=True)
            each = [F.scaled_dot_product_attention(*piece, is_causal=True, **how) for piece in pieces]
            found.append(torch.cat(each, 2))
        return torch.cat(found, 1).transpose(1, 2)

    return attend


def cut(tokens: int, groups: int, shifted: bool) -> list[int]:
    """Lengths of the groups of a document; the last one may be shorter, and where they are shifted the first."""
    size = -(-tokens // groups)
    first = size // 2 if shifted and groups > 1 else 0
    borders = sorted({0, *range(first, tokens, size), tokens})
    return [end - start for start, end in pairwise(borders)]


def grouped(mask: Tensor, groups: int, shifted: bool) -> Tensor:
    """Which pairs of tokens are in one group, bool like the mask [rows, 1, tokens, tokens]."""
    rows, _, tokens, _ = mask.shape
    number = torch.zeros(rows, tokens, dtype=torch.int64)
    for row, pairs in enumerate(mask[:, 0].cpu()):
        of_all = [piece for length in _lengths(pairs) for piece in cut(length, groups, shifted)]
        number[row] = torch.arange(len(of_all)).repeat_interleave(torch.tensor(of_all))
    number = number.to(mask.device)
    return (number[:, :, None] == number[:, None, :])[:, None]


def _lengths(pairs: Tensor) -> list[int]:
    """Lengths of the documents of a row, from what sees what [tokens, tokens]; each token of padding is one alone.

    A token of a document sees the one before it, but for the first; a token of padding does not see itself.
    """
    begins = (~(pairs.diagonal(-1) & pairs.diagonal()[1:])).nonzero().flatten() + 1
    return [end - start for start, end in pairwise([0, *begins.tolist(), len(pairs)])]
