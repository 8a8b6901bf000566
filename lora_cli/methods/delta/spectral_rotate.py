"""spectral_rotate: the r leading singular vectors of W0 are turned among themselves, left and right. arXiv:2405.13952

ΔW = s·U·(R·Σ·Tᵀ − Σ)·V with U [out, r], V [r, in] and Σ of W0, and Cayley transforms R and T [r, r] that start at
the identity: r·(r − 1) numbers a layer, whatever its size. Saved as LoRA of rank r.
"""

import torch
from torch import Tensor, nn

from lora_cli.adapter.delta import Factored, Place
from lora_cli.adapter.orthogonal import cayley
from lora_cli.adapter.spectrum import decomposed

needs = {"init.own": "it starts at the identity", "trainable.all": "both sides turn"}
forbids = {"lora_bias": "there is no B·A to add it to"}


class SpectralRotate(Factored):
    """The entries of both skew-symmetric matrices, and the r leading singular vectors and values."""

    def __init__(self, place: Place) -> None:
        """Nothing is decomposed before `start`."""
        super().__init__(place)
        self.base, self.r = place.base, place.r
        sizes = shapes(place.base.in_features, place.base.out_features, place.r)
        tensors = {key: nn.Parameter(torch.zeros(size), key not in FROZEN) for key, size in sizes.items()}
        self.left, self.right = tensors["left"], tensors["right"]
        self.U, self.V, self.S = tensors["U"], tensors["V"], tensors["S"]

    def start(self, generator: torch.Generator) -> None:
        """U, Σ and V from W0; nothing is turned."""
        U, S, Vt = decomposed(self.base)
        with torch.no_grad():
            for tensor in (self.left, self.right):
                tensor.zero_()
            self.U.copy_(U[:, : self.r])
            self.S.copy_(S[: self.r])
            self.V.copy_(Vt[: self.r])

    def up(self) -> Tensor:
        """U·(R·Σ·Tᵀ − Σ), from R − I and T − I, so that it starts at exactly zero."""
        R, T = cayley(self.left, self.r), cayley(self.right, self.r)
        return self.U @ (R * self.S + (self.S * T).t() + (R * self.S) @ T.t())

    def down(self) -> Tensor:
        """V."""
        return self.V


make = SpectralRotate


def problem(in_features: int, out_features: int, r: int) -> str | None:
    """What keeps a layer of this shape from being adapted."""
    if r < 2:
        return "r has to be 2 at least: there is nothing to turn one vector into"
    most = min(in_features, out_features)
    return f"r = {r} is more than its {most} singular vectors" if r > most else None


def shapes(in_features: int, out_features: int, r: int) -> dict[str, tuple[int, ...]]:
    """The tensors that make up ΔW; U, V and S never train."""
    turns = {"left": (r * (r - 1) // 2,), "right": (r * (r - 1) // 2,)}
    return turns | {"U": (out_features, r), "V": (r, in_features), "S": (r,)}


FROZEN = frozenset({"U", "V", "S"})
