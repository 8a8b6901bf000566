"""loha: ΔW = s·(B1·A1) ⊙ (B2·A2), two thin products multiplied entry by entry; rank up to r². arXiv:2108.06098

Twice LoRA's numbers at the same r, and with r = 4 a rank of up to 16. ΔW is made in every pass, forward and backward:
a step costs more than LoRA's, the more the larger the layer.
"""

import torch
from torch import Tensor, nn

from lora_cli.adapter.delta import Place, Shape
from lora_cli.adapter.dense import Dense
from lora_cli.adapter.start import uniform

needs = {"init.own": "it has two pairs of factors, of which one starts at zero"}
forbids = {
    "base.embedding": "a table of the vocabulary's size would be made in every step",
    "base.convolution": "its input is not a row but a picture, with patches",
    "lora_bias": "there is no single B to add it to",
    "trainable.lora_fa": "it has two pairs of factors, A1 and A2",
    "trainable.only_a": "it has two pairs of factors, B1 and B2",
    "optimizer.lora_plus": "it has two pairs of factors, and no single B",
}


class LoHa(Dense):
    """The Hadamard product of two products of rank r."""

    compact = True

    def __init__(self, place: Place) -> None:
        """Zero."""
        super().__init__(place)
        for key, shape in shapes(place.base.in_features, place.base.out_features, place.r).items():
            self.register_parameter(key, nn.Parameter(torch.zeros(shape)))

    def start(self, generator: torch.Generator) -> None:
        """Kaiming-uniform, but A2 at zero."""
        for key in ("A1", "B1", "B2"):
            uniform(self.get_parameter(key), generator)
        nn.init.zeros_(self.get_parameter("A2"))

    def tensors(self) -> tuple[Tensor, ...]:
        """B1, A1, B2, A2."""
        return tuple(self.get_parameter(key) for key in ("B1", "A1", "B2", "A2"))

    @staticmethod
    def made(B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(B1·A1) ⊙ (B2·A2)."""
        return (B1 @ A1) * (B2 @ A2)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Each column of B1 times each of B2, each row of A1 times each of A2; None where r² is no low rank."""
        B1, A1, B2, A2 = (tensor.detach().float() for tensor in self.tensors())
        if B1.shape[1] ** 2 >= min(B1.shape[0], A1.shape[1]):
            return None
        B = (B1[:, :, None] * B2[:, None]).flatten(1)
        A = (A1[:, None] * A2[None]).flatten(0, 1)
        return self.scale * B, A


make = LoHa


def shapes(in_features: int, out_features: int, r: int) -> dict[str, Shape]:
    """The tensors that make up ΔW."""
    pair = (("A", (r, in_features)), ("B", (out_features, r)))
    return {f"{key}{number}": shape for number in (1, 2) for key, shape in pair}
