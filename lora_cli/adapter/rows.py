"""Rows: ΔW that replaces whole rows of an embedding (and of the head), for tokens the model did not have."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_cli.adapter.base import Base
from lora_cli.adapter.delta import Delta


class Rows(Delta):
    """W with the rows `ids` of the vocabulary replaced by trained `values` [len(ids), dim].

    Both ends of a tied model share one `values`.
    """

    ids: Tensor
    slots: Tensor

    def __init__(self, base: Base, ids: tuple[int, ...], values: nn.Parameter | None = None) -> None:
        """Start from the rows that stand there."""
        super().__init__()
        self.base = base
        self.values = nn.Parameter(_vocabulary_rows(base)[list(ids)].clone()) if values is None else values
        size = base.in_features if base.reads_ids else base.out_features
        slots = torch.full((size,), -1)
        slots[list(ids)] = torch.arange(len(ids))
        self.register_buffer("ids", torch.tensor(ids), persistent=False)
        self.register_buffer("slots", slots, persistent=False)

    def add_dropped(self, y: Tensor, x: Tensor) -> Tensor:
        """Overwrite what the new tokens look up, or how they score."""
        if not self.base.reads_ids:
            bias = None if self.base.bias is None else self.base.bias[self.ids]
            return y.index_copy(-1, self.ids, F.linear(x, self.values.to(x.dtype), bias).to(y.dtype))
        slot = self.slots[x]
        found = self.base.project(slot.clamp(min=0), self.values.t()).to(y.dtype)
        return torch.where((slot >= 0)[..., None], found, y)

    def weight(self) -> Tensor:
        """The difference to W0: zero but for the new rows."""
        rows = torch.zeros_like(_vocabulary_rows(self.base))
        rows[self.ids] = self.values.detach().float() - _vocabulary_rows(self.base)[self.ids]
        return rows.t() if self.base.reads_ids else rows


def _vocabulary_rows(base: Base) -> Tensor:
    """W0 with one row a token, float32."""
    return base.weight().t() if base.reads_ids else base.weight()
