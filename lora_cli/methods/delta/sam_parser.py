"""sam_parser: W = U·diag(σ + d)·Vᵀ, the singular values of W0 = U·diag(σ)·Vᵀ train. arXiv:2308.14604

As `svdiff`, but a singular value may pass through zero: it is a coefficient of the pair of vectors beside it.
"""

from torch import Tensor

from lora_cli.adapter.spectrum import Spectrum

needs = {"init.own": "it starts at zero", "trainable.all": "it is one tensor"}
forbids = {
    **dict.fromkeys(("r", "rank_pattern"), "it has no rank"),
    "train.parallel": "each process would have all singular vectors of W0, twice what it shares out",
    "lora_bias": "there is no B·A to add it to",
    "lifecycle.restart": "its directions are those of W0, and W0 would change under them",
}


class SAMParser(Spectrum):
    """The shifts d, one a singular value."""

    def change(self) -> Tensor:
        """The shifts themselves."""
        return self.d


make = SAMParser


def shapes(in_features: int, out_features: int, r: int) -> dict[str, tuple[int, ...]]:
    """The tensors that make up ΔW."""
    return {"d": (min(in_features, out_features),)}
