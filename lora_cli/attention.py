"""Attention over packed documents, each by itself: what lies between two of them is not computed only to be masked.

transformers hands packed documents to attention as one row and a mask over all pairs of its tokens. Here the mask is
read, and a row whose documents are plainly causal is cut at their borders; every other mask is used as it is. For
CPUs: on a GPU, reading the mask would wait for it.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "lora_documents"


def skips(model: PreTrainedModel) -> bool:
    """Whether attention over packed documents costs no more than over each alone."""
    return "flash" in str(model.config._attn_implementation) or _can_cut(model)


def use(model: PreTrainedModel) -> None:
    """Let a model on the CPU that uses PyTorch's attention cut packed rows at the borders of documents."""
    if _can_cut(model):
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def _can_cut(model: PreTrainedModel) -> bool:
    return model.device.type == "cpu" and model.config._attn_implementation in ("sdpa", NAME)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attention [batch, tokens, heads, width] of query, key and value [batch, heads, tokens, width]."""
    lengths = None if attention_mask is None else documents(attention_mask)
    if lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    return apart(lengths, module, query, key, value, **settings), None


def apart(
    lengths: Sequence[int], module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **settings: Any
) -> Tensor:
    """Causal attention over documents of these lengths, one behind the other in a row, each by itself."""
    # Not in 16 bits: PyTorch's CPU kernels for them take several times as long on short documents.
    wide = torch.promote_types(query.dtype, torch.float32)
    each = zip(*(t.to(wide).split(list(lengths), dim=2) for t in (query, key, value)), strict=True)
    alone = [sdpa_attention_forward(module, q, k, v, None, **settings)[0] for q, k, v in each]
    return torch.cat(alone, 1).to(query.dtype)


def documents(mask: Tensor) -> list[int] | None:
    """Lengths of the documents that a mask [1, 1, tokens, tokens] keeps apart; None where it says more than that.

    Each sees all of itself up to the token at hand, and nothing else.
    """
    rows, heads, tokens, seen = mask.shape
    if rows != 1 or heads != 1 or tokens != seen or mask.dtype is not torch.bool:
        return None
    pairs = mask[0, 0]
    starts = [0, *(1 + (~pairs.diagonal(-1)).nonzero().flatten()).tolist(), tokens]
    lengths = [end - start for start, end in pairwise(starts)]
    blocks = (pairs[start:end, start:end] for start, end in pairwise(starts))
    if not all(torch.equal(block, torch.ones_like(block).tril()) for block in blocks):
        return None
    causal = sum(length * (length + 1) // 2 for length in lengths)
    return lengths if int(pairs.sum()) == causal else None
