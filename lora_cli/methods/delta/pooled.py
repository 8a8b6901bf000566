"""pooled: ΔW = s·B·A·P, where P sums the inputs by groups of 32, those that share a zero point. arXiv:2309.14717

ΔW is the same for all inputs of a group, so it goes into the zero points of `model.quantize: int4`: merged, the model
has the codes and scales that it had. A has a 32nd of LoRA's numbers, and of the inputs only their sums are kept for the
backward pass. The sums of the authors' code are means times 32: the same.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_cli.adapter.base import Base
from lora_cli.adapter.delta import Factored, Place, Shape
from lora_cli.adapter.quantised import GROUP

needs = {
    "base.int4": "elsewhere these inputs have nothing in common",
    "init.own": "its A is drawn as the rows of LoRA's",
    "combine.add": "in another combination the weights of a group change in other ways",
}
forbids = {
    "base.embedding": "ids are not summed",
    "base.convolution": "its inputs are places of a picture",
    "lora_bias": "it has none",
    "trainable.only_a": "its B starts at zero and would stay there, and with it ΔW",
}
KEEPS_CODES = True


class Pooled(Factored):
    """A is [r, groups]."""

    compact = True

    def __init__(self, place: Place) -> None:
        """Zero."""
        super().__init__(place)
        self.in_features = place.base.in_features
        self.A = nn.Parameter(torch.zeros(place.r, groups(self.in_features)))
        self.B = nn.Parameter(torch.zeros(place.base.out_features, place.r))

    def start(self, generator: torch.Generator) -> None:
        """A ~ U(±1/√in), as LoRA's on all inputs; B at zero."""
        bound = self.in_features**-0.5
        nn.init.uniform_(self.A, -bound, bound, generator=generator)
        nn.init.zeros_(self.B)

    def up(self) -> Tensor:
        """B."""
        return self.B

    def down(self) -> Tensor:
        """A·P, [r, in]."""
        return self.A.repeat_interleave(GROUP, 1)[:, : self.in_features]

    def beside(self, base: Base, x: Tensor, dropped: Tensor) -> Tensor:
        """W0 is in codes; where `lora estimate` has a plain one in its place, it is computed the same way."""
        return self.add_dropped(base(x), dropped)

    def add_dropped(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y + s·B·(A·(P·x))."""
        whole = F.pad(x, (0, -self.in_features % GROUP))
        sums = whole.unflatten(-1, (-1, GROUP)).sum(-1)
        return self._add(y, sums, self.B, self.A, self.scale)


make = Pooled


def groups(in_features: int) -> int:
    """How many; the last one may be short."""
    return -(-in_features // GROUP)


def shapes(in_features: int, out_features: int, r: int) -> dict[str, Shape]:
    """The tensors that make up ΔW."""
    return {"A": (r, groups(in_features)), "B": (out_features, r)}
