"""svdiff: W = U·diag(relu(σ + d))·Vᵀ, the singular values of W0 = U·diag(σ)·Vᵀ shifted by d. arXiv:2303.11305

min(in, out) numbers a layer, starting at zero, and none but they are in the file; U and V are twice the numbers of
W0. Keep the base in the type in which it was trained with: in another it has slightly other singular vectors.
"""

import torch
from torch import Tensor

from lora_cli.adapter.spectrum import Spectrum

needs = {"init.own": "it starts at zero", "trainable.all": "it is one tensor"}
forbids = {
    **dict.fromkeys(("r", "rank_pattern"), "it has no rank"),
    "train.parallel": "each process would have all singular vectors of W0, twice what it shares out",
    "lora_bias": "there is no B·A to add it to",
    "lifecycle.restart": "its directions are those of W0, and W0 would change under them",
}


class SVDiff(Spectrum):
    """The shifts d, one a singular value."""

    def change(self) -> Tensor:
        """relu(σ + d) − σ: no singular value becomes negative."""
        return torch.relu(self.S + self.d) - self.S


make = SVDiff


def shapes(in_features: int, out_features: int, r: int) -> dict[str, tuple[int, ...]]:
    """The tensors that make up ΔW."""
    return {"d": (min(in_features, out_features),)}
