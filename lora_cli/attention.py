"""Attention over packed documents, each by itself: what lies between two of them is not computed only to be masked.

transformers hands packed documents to attention as one row and a mask over all pairs of its tokens. Here the mask is
read, and a row whose documents are plainly causal is cut at their borders; every other mask is used as it is. For
CPUs: on a GPU, reading the mask would wait for it, and `varlen` is told the documents instead.

And attention that a method changes while training, by transformers' own register of implementations.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lora_cli import parts, varlen
from lora_cli.errors import ExitCode, UserError
from lora_cli.parts import Part

NAME = "lora_documents"


def skips(model: PreTrainedModel, device: torch.device | None = None) -> bool:
    """Whether attention over packed documents costs no more than over each alone, on this device or where it is."""
    device = device or model.device
    return (
        "flash" in str(model.config._attn_implementation)
        or _can_cut(model, device)
        or varlen.serves(model, device)
    )


def use(model: PreTrainedModel) -> None:
    """Let a model that uses PyTorch's attention compute none between the documents of a packed row."""
    if varlen.serves(model, model.device):
        varlen.use(model)
    if _can_cut(model, model.device):
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


Attend = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor | None, dict[str, Any]], Tensor]
"""Attention as transformers asks for it: module, query, key, value, mask, settings -> [batch, tokens, heads, width]."""


def train_with(model: PreTrainedModel, part: Part) -> None:
    """Let the model, while it is in training mode, attend as a part of the attention axis says.

    In evaluation it attends as before.

    Raises:
        UserError: the model computes its attention in a way that a part cannot stand in for.
    """
    made = parts.load("attention", part.name).make(model, **parts.settings("attention", part))
    if made is None:
        return
    if model.config._attn_implementation not in ("sdpa", NAME, varlen.NAME):
        what = f"{model.config.model_type} attends by {model.config._attn_implementation} here, not by sdpa"
        raise UserError(what, where=f"adapter.attention: {part.name}", code=ExitCode.MODEL)
    cuts = model.config._attn_implementation == NAME
    name = f"lora_{part.name}_{next(_NUMBERS)}"
    AttentionInterface.register(name, partial(_switched, made, attend if cuts else sdpa_attention_forward))
    AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)


_NUMBERS = itertools.count()
"""Every training has an attention of its own."""


def _switched(
    training: Attend,
    otherwise: Callable[..., tuple[Tensor, None]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **settings: Any,
) -> tuple[Tensor, None]:
    if not module.training:
        return otherwise(module, query, key, value, attention_mask, **settings)
    if settings.get("softcap") is not None or settings.get("s_aux") is not None:
        what = f"{type(module).__name__} does more with its scores than to compare them"
        raise UserError(what, where="adapter.attention", fix="leave it out", code=ExitCode.MODEL)
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) if groups > 1 else t for t in (key, value))
    return training(module, query, key, value, attention_mask, settings), None


def _can_cut(model: PreTrainedModel, device: torch.device) -> bool:
    return device.type == "cpu" and model.config._attn_implementation in ("sdpa", NAME)


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
