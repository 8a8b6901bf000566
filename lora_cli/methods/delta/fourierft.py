"""fourierft: ΔW = s·Re(F⁻¹(C)), where C is zero but for n entries at random places, which train. arXiv:2405.03003

`r` is n, the number of frequencies: n numbers a layer, whatever its size. Starts at zero. Where the entries are
follows from `seed`, which is kept with the adapter.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from lora_cli.adapter.delta import Delta, Place
from lora_cli.recipe.schema import Section

needs = {"init.own": "it starts at zero", "trainable.all": "it is one tensor"}
forbids = {
    "base.embedding": "ids have no Fourier transform",
    "base.convolution": "it would be a transform of every patch",
    "lora_bias": "there is no B·A to add it to",
}


class Settings(Section):
    """Settings in a recipe: `{fourierft: {seed: 777}}`."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=777, description="Of the places of the entries; the default is PEFT's."
    )


class FourierFT(Delta):
    """The n entries of C, and where they are."""

    rows: Tensor
    columns: Tensor

    def __init__(self, place: Place, seed: int) -> None:
        """The places are drawn on the CPU, so that they are the same everywhere."""
        super().__init__(place.dropout)
        base = place.base
        self.scale, self.shape = place.scale, (base.out_features, base.in_features)
        self.c = nn.Parameter(torch.zeros(place.r))
        order = torch.randperm(
            base.out_features * base.in_features, generator=torch.Generator().manual_seed(seed)
        )
        chosen = order[: place.r]
        self.register_buffer("rows", chosen // base.in_features, persistent=False)
        self.register_buffer("columns", chosen % base.in_features, persistent=False)

    def start(self, generator: torch.Generator) -> None:
        """Zero."""
        nn.init.zeros_(self.c)

    def add_dropped(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y + ΔW·x: x's own transform, its entries that C meets, and back; nothing is as large as W0.

        ΔW[a, b] is the real part of s/(out·in)·Σ c·exp(2πi·(j·a/out + l·b/in)) over the entries (j, l) of C.
        """
        met = torch.fft.ifft(x.float())[..., self.columns] * self.c
        spectrum = met.new_zeros((*met.shape[:-1], self.shape[0])).index_add(-1, self.rows, met)
        return y + (self.scale * torch.fft.ifft(spectrum).real).to(y.dtype)

    def weight(self) -> Tensor:
        """The inverse transform of C."""
        C = self.c.detach().new_zeros(self.shape)
        C[self.rows, self.columns] = self.c.detach()
        return self.scale * torch.fft.ifft2(C).real


make = FourierFT


def problem(in_features: int, out_features: int, r: int, seed: int) -> str | None:
    """What keeps a layer of this shape from being adapted."""
    most = in_features * out_features
    return f"r = {r} frequencies are more than the {most} that there are" if r > most else None


def shapes(in_features: int, out_features: int, r: int, seed: int) -> dict[str, tuple[int, ...]]:
    """The tensors that make up ΔW."""
    return {"c": (r,)}
