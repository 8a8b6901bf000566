"""hra: W = W0·H1···Hr, r reflections H = I − 2·u·uᵀ/‖u‖², each with a trained u. arXiv:2405.17484

R = H1···Hr is orthogonal and differs from I by rank r: in·r numbers a layer, and saved as LoRA of rank r. The
reflections start in pairs that undo each other (`init: pairs`), so r is even.
"""

import torch
from torch import Tensor, nn

from lora_cli.adapter.delta import Place
from lora_cli.adapter.orthogonal import Turned

needs = {
    "init.pairs": "a reflection is never the identity, so that they have to start in pairs",
    "trainable.all": "it is one tensor",
}
forbids = {
    "base.embedding": "its input are ids, which cannot be turned",
    "base.convolution": "it would have to turn every patch of the input",
    "lora_bias": "there is no B·A to add it to",
}


class HRA(Turned):
    """The rows of U [r, in] are the u."""

    def __init__(self, place: Place) -> None:
        """The init draws U."""
        super().__init__(place)
        self.U = nn.Parameter(torch.ones(place.r, place.base.in_features))

    def _product(self) -> tuple[Tensor, Tensor]:
        """N [r, in], the u at length 1, and upper triangular T [r, r], so that R = I − Nᵀ·T·N.

        T⁻¹ is N·Nᵀ above the diagonal and ½ on it (Schreiber and Van Loan, 1989).
        """
        N = self.U / self.U.norm(dim=1, keepdim=True)
        half = 0.5 * torch.eye(len(N), dtype=N.dtype, device=N.device)
        with torch.autocast(N.device.type, enabled=False):
            inverse = torch.triu(N @ N.t(), 1) + half
        return N, torch.linalg.solve_triangular(inverse, 2 * half, upper=True)

    def moved(self, x: Tensor) -> Tensor:
        """−Nᵀ·T·N·x."""
        N, T = self._product()
        N, T = N.to(x.dtype), T.to(x.dtype)
        return -(x @ N.t() @ T.t() @ N)

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor]:
        """(−s·W0·Nᵀ·T, N)."""
        N, T = self._product()
        return -self.scale * self.base.weight() @ N.t() @ T, N


make = HRA


def problem(in_features: int, out_features: int, r: int) -> str | None:
    """What keeps a layer of this shape from being adapted."""
    return f"r = {r} has to be even: the reflections start in pairs" if r % 2 else None


def shapes(in_features: int, out_features: int, r: int) -> dict[str, tuple[int, ...]]:
    """The tensors that make up ΔW."""
    return {"U": (r, in_features)}
