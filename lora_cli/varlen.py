"""Attention over packed documents on a GPU: one kernel for all of them, told where each ends. arXiv:2307.08691

The model is handed the lengths along with the batch, so no mask over all pairs of tokens is made and nothing waits for
the GPU: they are counted on the host, once a batch. The kernel is PyTorch's own (`torch.nn.attention.varlen`); where it
does not serve (see `in_one`) each document goes through `scaled_dot_product_attention` by itself.

Tested on CPUs against a plain kernel with the same arguments; it has not run on a GPU yet.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "lora_varlen"
Kernel = Callable[..., Any]
"""With the arguments of `varlen_attn`: query, key, value [tokens, heads, width] -> [tokens, heads, width]."""
HALF = (torch.bfloat16, torch.float16)
WINDOWED = ("mistral", "ministral", "mixtral", "phi3", "starcoder2")
"""Models without `layer_types` whose layers say the window that their masks have, by test: those of phimoe say none,
and those of olmoe say one that its masks have not."""
IMAGINED = (8, 9)
"""Capability of a GPU that is not there, when fake tensors are on it: of those of today, the one that can do least."""


@dataclass(frozen=True, eq=False)
class Documents:
    """What stands one behind the other in a packed row."""

    lengths: tuple[int, ...]
    ends: Tensor
    """0 and where each document ends, int32 [documents + 1], on the device."""
    device: torch.device
    """What attention is computed on."""

    @classmethod
    def of(cls, position_ids: Tensor, device: torch.device) -> "Documents":
        """Of a packed row [1, tokens] on the CPU, whose positions restart at 0 with each."""
        starts = [*(position_ids[0] == 0).nonzero().flatten().tolist(), position_ids.shape[1]]
        ends = torch.tensor(starts, dtype=torch.int32).to(device, non_blocking=True)
        return cls(tuple(end - start for start, end in pairwise(starts)), ends, device)


def serves(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether documents can be told apart without a mask, were the model on this device.

    Where transformers gives a model to flash attention, its layers say all that they ask for without a mask, but for
    windows that are no plain sliding ones.
    """
    config = model.config
    kinds = {*(getattr(config, "layer_types", None) or ())}
    unsaid = not kinds and getattr(config, "sliding_window", None) and config.model_type not in WINDOWED
    return (
        device.type == "cuda"
        and config._attn_implementation in ("sdpa", NAME)
        and model._supports_flash_attn
        and kinds <= {"full_attention", "sliding_attention"}
        and not unsaid
        and all(getattr(module, "is_causal", True) for module in model.modules())
    )


def use(model: PreTrainedModel) -> None:
    """Let a model attend to packed documents as they are told it; to everything else as before."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def told(model: PreTrainedModel, position_ids: Tensor, device: torch.device) -> dict[str, Any]:
    """What a model is called with besides a packed row, whose positions [1, tokens] are still on the CPU.

    The mask stands for the documents: transformers hands one of four dimensions on as it is, and makes none.
    """
    if model.config._attn_implementation != NAME:
        return {}
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    return {"documents": Documents.of(position_ids, device), "attention_mask": mask}


@dataclass(frozen=True)
class Asked:
    """What attention is asked for, as far as the choice of a kernel goes by it."""

    device: str
    capability: tuple[int, int]
    """Of the GPU, as CUDA counts."""
    dtype: torch.dtype
    width: int
    """Of a head's queries and keys."""
    value_width: int
    reach: int
    """(tokens + 128 · documents) · heads · width."""
    more: bool = False
    """Whether weights are dropped, or scores bent, biased or given a sink."""


def in_one(asked: Asked) -> bool:
    """Whether one kernel computes this for all documents.

    What FlashAttention 2 as PyTorch builds it checks: 16 bits, an Ampere GPU or later, heads of one width that is a
    multiple of 8 and at most 256, above 192 only where its backward pass has been built for it. That pass counts in
    32 bits over rows of documents padded to 128 tokens.
    """
    widest = 256 if asked.capability in ((8, 0), (9, 0)) else 192
    return (
        asked.device == "cuda"
        and asked.capability >= (8, 0)
        and asked.dtype in HALF
        and asked.width == asked.value_width
        and asked.width % 8 == 0
        and asked.width <= widest
        and asked.reach < 2**31
        and not asked.more
    )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    documents: Documents | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attention [batch, tokens, heads, width] of query, key and value [batch, heads, tokens, width]."""
    if documents is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    if in_one(_asked(query, value, documents, settings)):
        return together(documents, query, key, value, **settings), None
    return apart(documents, module, query, key, value, **settings), None


def together(
    documents: Documents,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    kernel: Kernel = varlen_attn,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> Tensor:
    """Causal attention [1, tokens, heads, width] over each document by itself, by one kernel.

    Args:
        documents: of the row.
        query: [1, heads, tokens, width].
        key: [1, fewer heads, tokens, width].
        value: as key.
        kernel: what computes it.
        scaling: of the scores; default: 1/√width.
        sliding_window: most tokens that one sees, itself included.
    """
    kind, longest = _computed(query), max(documents.lengths)
    q, k, v = (t.squeeze(0).transpose(0, 1).to(kind) for t in (query, key, value))
    behind = sliding_window - 1 if sliding_window and sliding_window < longest else -1
    how: dict[str, Any] = {"scale": scaling, "window_size": (behind, 0)}
    if q.shape[1] != k.shape[1] and _asks_for_groups(kernel):
        how["enable_gqa"] = True
    ends = documents.ends
    return kernel(q, k, v, ends, ends, longest, longest, **how).unsqueeze(0)


def apart(
    documents: Documents,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    sliding_window: int | None = None,
    **settings: Any,
) -> Tensor:
    """The same, one document after the other."""
    each = zip(*(t.split(documents.lengths, dim=2) for t in (query, key, value)), strict=True)
    masks = (window(length, sliding_window, query.device) for length in documents.lengths)
    alone = [
        sdpa_attention_forward(module, q, k, v, mask, **settings)[0]
        for (q, k, v), mask in zip(each, masks, strict=True)
    ]
    return torch.cat(alone, 1)


def window(length: int, width: int | None, device: torch.device) -> Tensor | None:
    """Which pairs of a document see each other [1, 1, length, length]; None where all that is causal does."""
    if not width or length <= width:
        return None
    near = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return near.triu(1 - width)[None, None]


def _asked(query: Tensor, value: Tensor, documents: Documents, settings: dict[str, Any]) -> Asked:
    _, heads, tokens, width = query.shape
    bent = any(settings.get(key) is not None for key in ("softcap", "s_aux", "position_bias"))
    return Asked(
        device=documents.device.type,
        capability=_capability(documents.device),
        dtype=_computed(query),
        width=width,
        value_width=value.shape[-1],
        reach=(tokens + 128 * len(documents.lengths)) * heads * width,
        more=bent or bool(settings.get("dropout")),
    )


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    """(0, 0) where PyTorch was built without the kernel, or for AMD's GPUs, where it is another one."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return IMAGINED
    built = torch.backends.cuda.is_flash_attention_available() and torch.version.hip is None
    return torch.cuda.get_device_capability(device) if built else (0, 0)


@cache
def _asks_for_groups(kernel: Kernel) -> bool:
    """Whether it has to be told that heads share keys; before PyTorch 2.12 it saw that by itself."""
    return "enable_gqa" in signature(kernel).parameters


def _computed(query: Tensor) -> torch.dtype:
    """What attention computes in: under autocast some models hand over queries in float32 all the same."""
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
