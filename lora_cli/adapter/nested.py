"""Nested: LoRA of rank r whose first b components are LoRA of rank b, for every b. arXiv:2210.07558"""

from torch import Tensor

from lora_cli.adapter.delta import LowRank, Place


class Nested(LowRank):
    """All components, of which the first `b` compute while it trains."""

    in_order = True

    def __init__(self, place: Place) -> None:
        """All of them compute until somebody says otherwise."""
        super().__init__(place)
        self.r = self.b = place.r

    def up(self) -> Tensor:
        """Of the first components, times r/b: the scale stays α/r, and its effect is α/b."""
        return self.B if self._all() else self.B[:, : self.b] * (self.r / self.b)

    def down(self) -> Tensor:
        """Of the first components."""
        return self.A if self._all() else self.A[: self.b]

    def _all(self) -> bool:
        return not self.training or self.b == self.r

    def factors(self) -> tuple[Tensor, Tensor]:
        """Of all components, whatever computes now."""
        return self.scale * self.B.detach().float(), self.A.detach().float()
