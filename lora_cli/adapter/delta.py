"""Delta: ΔW. `LowRank` is the workhorse, ΔW = s·B·A. arXiv:2106.09685

Shapes: A is [r, in], B is [out, r]; x is [..., in] (or ids [...]), y is [..., out].
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_cli.adapter.base import Base
from lora_cli.adapter.fused import product
from lora_cli.adapter.reading import Reader
from lora_cli.adapter.seed import generator_of

Shape = tuple[int, ...]


@dataclass
class Shared:
    """What several layers of one adapter have in common: each such tensor is one parameter, trained or frozen."""

    shapes: Mapping[str, Shape] = field(default_factory=dict[str, Shape])
    """Name -> shape, as large as the largest of its layers asks for; the others use its first rows and columns."""
    seed: int = 0
    tensors: dict[str, nn.Parameter] = field(default_factory=dict[str, nn.Parameter])
    reader: Reader = field(default_factory=Reader)
    """Who knows what the model is reading."""
    blocks: dict[str, Any] = field(default_factory=dict[str, Any])
    """Name of a module -> what those of its layers have in common that work together."""

    def tensor(self, name: str, draw: Callable[[Shape, torch.Generator], Tensor]) -> nn.Parameter:
        """The tensor of that name; `draw` fills it for the first layer that asks, from a generator of its own."""
        if name not in self.tensors:
            self.tensors[name] = nn.Parameter(draw(self.shapes[name], generator_of(self.seed, name)))
        return self.tensors[name]


@dataclass(frozen=True)
class Place:
    """Where a delta goes, and how large it is to be."""

    base: Base
    r: int
    scale: float
    dropout: nn.Module | None = None
    bias: bool = False
    shared: Shared = field(default_factory=Shared)
    name: str = ""
    """Of the layer in the model."""


@dataclass
class Ledger:
    """What a router has decided about the last batch, for whoever balances its load."""

    asked: bool = False
    """Whether there is anybody."""
    probabilities: Tensor | None = None
    """[..., experts], float32, with their graph: of all experts, chosen or not."""
    chosen: Tensor | None = None
    """[..., experts], bool."""

    def write(self, logits: Tensor, chosen: Tensor) -> None:
        """Remember it, if anybody has asked."""
        if self.asked:
            self.probabilities, self.chosen = logits.softmax(-1), chosen

    def clear(self) -> None:
        """Forget it, and with it the graph that it hangs on."""
        self.probabilities = self.chosen = None


class Delta(nn.Module, ABC):
    """What is added to W0."""

    compact = False
    """True where the tensors of ΔW are far smaller than its factors, so that they are what is saved."""
    in_order = False
    """True where the place of a component means something: one that is zero is saved like the others."""
    ledger: Ledger | None = None
    """Where it sends every token to a few of its experts, and may be asked which."""

    def __init__(self, dropout: nn.Module | None = None) -> None:
        """`dropout` drops from x; None, so that the hot path has nothing to call, when nothing is dropped."""
        super().__init__()
        self.dropout = dropout

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y + ΔW·x."""
        return self.add_dropped(y, self.dropped(x))

    def beside(self, base: Base, x: Tensor, dropped: Tensor) -> Tensor:
        """Return W0·x + b0 + ΔW·dropped, where `dropped` is x after dropout, or x itself."""
        return self.add_dropped(base(x), dropped)

    def dropped(self, x: Tensor) -> Tensor:
        """What of x reaches ΔW."""
        return x if self.dropout is None else self.dropout(x)

    def put_on(self, base: Base) -> None:
        """Compute with what W0 has been quantised to, where ΔW is made of W0."""
        if "base" in vars(self):
            self.base = base

    @abstractmethod
    def add_dropped(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y + ΔW·x for an x from which has been dropped what is to be dropped."""

    @abstractmethod
    def weight(self) -> Tensor:
        """ΔW in float32 [out, in], scale included."""

    def shift(self) -> Tensor | None:
        """What is added to the bias [out], scale included; None when nothing is."""
        return None

    def start(self, generator: torch.Generator) -> None:
        """Be zero, as `init: own` asks, at first and after every restart; nothing to do where another init fills it.

        What is drawn comes from `generator`, which is the layer's own. Tensors that it shares are left alone.
        """

    def packed(self) -> dict[str, Tensor] | None:
        """What is saved in place of the layer's own tensors, where less says the same; None where nothing does.

        The file of such a delta has `packed_shapes` beside `shapes`.
        """
        return None

    def unpack(self, tensors: dict[str, Tensor]) -> None:
        """Be what `packed` gave, or computes the same."""

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(B', A') in float32 with B'·A' = ΔW exactly, or None when it is not of low rank."""
        return None


class Factored(Delta):
    """ΔW·x = s·(up·(down·x)), never (up·down)·x: no tensor of W0's shape is made or saved for backward."""

    def __init__(self, place: Place) -> None:
        """Nothing but what it takes to multiply; a subclass has the tensors."""
        super().__init__(place.dropout)
        self.scale = place.scale
        self.project = place.base.project
        self.reads_ids = place.base.reads_ids

    @abstractmethod
    def up(self) -> Tensor:
        """What down·x is multiplied with, [out, r]."""

    @abstractmethod
    def down(self) -> Tensor:
        """What x is multiplied with, [r, in]."""

    def beside(self, base: Base, x: Tensor, dropped: Tensor) -> Tensor:
        """Return W0·x + b0 + ΔW·dropped; with a plain frozen W0 as one step of the graph."""
        W = base.dense
        if W is None:
            return super().beside(base, x, dropped)
        return product(x, dropped, W, base.bias, self.down(), self.up(), self.scale)

    def add_dropped(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y + ΔW·x."""
        return self._add(y, x, self.up(), self.down(), self.scale)

    def _add(self, y: Tensor, x: Tensor, B: Tensor, A: Tensor, scale: float) -> Tensor:
        """One addmm: no temporary as wide as y, and the scale costs nothing.

        The small matrices are cast to the large ones' type, never the other way round.
        """
        z = self.project(x, A.to(y.dtype if self.reads_ids else x.dtype))
        rows, z = y.reshape(-1, y.shape[-1]), z.reshape(-1, z.shape[-1])
        return torch.addmm(rows, z.to(y.dtype), B.to(y.dtype).t(), alpha=scale).view_as(y)

    def weight(self) -> Tensor:
        """The product of the factors."""
        B, A = self.factors()
        return B @ A

    def factors(self) -> tuple[Tensor, Tensor]:
        """(s·up, down)."""
        return self.scale * self.up().detach().float(), self.down().detach().float()


class LowRank(Factored):
    """ΔW·x = s·(B·(A·x) + b), and what is fixed: a part of W0 that is taken off, or was learned before."""

    def __init__(self, place: Place) -> None:
        """Zero factors of rank r, in float32 whatever the base is stored in: small steps would vanish in bf16."""
        super().__init__(place)
        base = place.base
        self.A = nn.Parameter(torch.zeros(place.r, base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, place.r))
        self.bias = nn.Parameter(torch.zeros(base.out_features)) if place.bias else None
        self.fixed_A: nn.Parameter | None = None
        self.fixed_B: nn.Parameter | None = None

    def up(self) -> Tensor:
        """What A·x is multiplied with, [out, r]."""
        return self.B

    def down(self) -> Tensor:
        """What x is multiplied with, [r, in]."""
        return self.A

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y + ΔW·x. What is fixed stands for a part of W0: nothing is dropped from its input."""
        return self._add_trained(self._add_fixed(y, x), self.dropped(x))

    def add_dropped(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y + ΔW·x."""
        return self._add_trained(self._add_fixed(y, x), x)

    def beside(self, base: Base, x: Tensor, dropped: Tensor) -> Tensor:
        """Return W0·x + b0 + ΔW·dropped; with a plain frozen W0 as one step of the graph."""
        W = base.dense
        if W is None:
            return self._add_trained(self._with_fixed(base, x), dropped)
        if self.fixed_A is not None and self.fixed_B is not None:
            y = product(x, x, W, base.bias, self.fixed_A, self.fixed_B, 1.0)
            return self._add_trained(y, dropped)
        bias = base.bias
        if self.bias is not None:
            own = self.scale * self.bias.to(W.dtype)
            bias = own if bias is None else bias + own
        return product(x, dropped, W, bias, self.down(), self.up(), self.scale)

    def trained(self) -> dict[str, nn.Parameter]:
        """The tensors by name, without what is fixed."""
        return {key: p for key, p in self.named_parameters() if not key.startswith("fixed_")}

    def _with_fixed(self, base: Base, x: Tensor) -> Tensor:
        """W0·x + b0 and what is fixed; what was taken off W0 before it was quantised stands in both, and cancels."""
        if base.taken is not None and base.taken[1] is self.fixed_A:
            return base.without_taken(x)
        return self._add_fixed(base(x), x)

    def _add_fixed(self, y: Tensor, x: Tensor) -> Tensor:
        if self.fixed_A is None or self.fixed_B is None:
            return y
        return self._add(y, x, self.fixed_B, self.fixed_A, 1.0)

    def _add_trained(self, y: Tensor, x: Tensor) -> Tensor:
        if self.bias is not None:
            y = y + self.scale * self.bias.to(y.dtype)
        return self._add(y, x, self.up(), self.down(), self.scale)

    def fix(self, B: Tensor, A: Tensor) -> None:
        """Add B·A [out, in] to what is fixed: it is a part of ΔW from now on, and never trains."""
        if self.fixed_A is not None and self.fixed_B is not None:
            B, A = torch.cat([self.fixed_B, B], 1), torch.cat([self.fixed_A, A], 0)
        self.fixed_B = nn.Parameter(B.detach().clone(), requires_grad=False)
        self.fixed_A = nn.Parameter(A.detach().clone(), requires_grad=False)

    def unfix(self) -> None:
        """Let go of what is fixed: it is a part of W from now on."""
        self.fixed_A = self.fixed_B = None

    def subtract_start(self) -> None:
        """Let ΔW be s·(B·A − B0·A0), where (A0, B0) are what A and B are now: the model starts as the base.

        W0 itself is not touched, so in every precision the adapter goes with the original base.
        """
        self.fix(-self.scale * self.up(), self.down())

    def shift(self) -> Tensor | None:
        """s·b."""
        return None if self.bias is None else self.scale * self.bias.detach().float()

    def factors(self) -> tuple[Tensor, Tensor]:
        """(s·B, A), with what is fixed below and beside them."""
        B, A = super().factors()
        if self.fixed_A is None or self.fixed_B is None:
            return B, A
        return torch.cat([B, self.fixed_B.float()], 1), torch.cat([A, self.fixed_A.float()], 0)
