"""ffn_experts: the MLP of a block becomes several experts, each with a LoRA of its own on every layer. arXiv:2404.15159

E_n(x) = MLP with W + s·B_n·A_n in place of each W, y = Σ g_n(x)·E_n(x) over the `top` experts that one router for the
whole MLP gives the token; what lies between the layers is computed once for each of them. So the layers have to be
MLPs: some that widen, one that narrows. Depends on the input: never merged.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Annotated, NoReturn, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from lora_cli.adapter.base import Base
from lora_cli.adapter.delta import Delta, Ledger, Place
from lora_cli.adapter.start import uniform
from lora_cli.recipe.schema import Section

mergeable = False
needs = {"init.own": "a router has to be drawn, too"}
forbids = {
    "base.embedding": "it is no layer of an MLP",
    "base.expert": "an expert is given some of the tokens only, and not where they stand",
    "base.convolution": "it is no layer of an MLP",
    "lora_bias": "there is no single B to add it to",
    "trainable.only_a": "B would stay zero for ever, and with it ΔW",
}


class Settings(Section):
    """Settings in a recipe: `{ffn_experts: {count: 8, top: 2}}`."""

    count: Annotated[int, Field(ge=3)] = Field(default=8, description="Experts of an MLP.")
    top: Annotated[int, Field(ge=2)] = Field(
        default=2,
        description="Experts that a token is given, the best ones; of one the router would learn nothing.",
    )

    def contradictions(self) -> Iterator[str]:
        """Some of them, not all."""
        if self.top >= self.count:
            yield "'top' has to be below 'count'; with all experts there is nothing to choose"


class Mlp:
    """The layers of one MLP: the narrowing one has the router, the widening ones are called first and ask it."""

    def __init__(self, top: int) -> None:
        """Before the first token."""
        self.top, self.ledger = top, Ledger()
        self.closing: Closing | None = None
        self.read: Tensor | None = None

    def decide(self, x: Tensor) -> None:
        """Send every token of x [..., in] to its best experts, unless a layer beside has just asked the same."""
        if x is self.read:
            return
        assert self.closing is not None, "the plan has seen that every MLP has one"
        self.read, router = x, self.closing.router
        logits = F.linear(x, router.to(x.dtype)).float()
        best = logits.topk(self.top, -1)
        self.weights = best.values.softmax(-1)
        self.chosen = F.one_hot(best.indices, len(router))
        self.ledger.write(logits, self.chosen.sum(-2) > 0)


class Layer(Delta):
    """One layer of all experts: A is [count·r, in], B is [out, count·r]."""

    def __init__(self, place: Place, count: int, top: int) -> None:
        """Find the MLP that the layer is of."""
        super().__init__(place.dropout)
        self.scale, self.count = place.scale, count
        self.project = place.base.project
        self.A = nn.Parameter(torch.zeros(count * place.r, place.base.in_features))
        self.B = nn.Parameter(torch.zeros(place.base.out_features, count * place.r))
        self.mlp: Mlp = place.shared.blocks.setdefault(owner(place.name), Mlp(top))
        self.ledger = self.mlp.ledger

    def add_slot(self, y: Tensor, x: Tensor, slot: int) -> Tensor:
        """Return y + s·B_n·A_n·x, n for each token the expert in its `slot`-th place."""
        z = self.project(x, self.A.to(x.dtype)).unflatten(-1, (self.count, -1))
        z = (self.mlp.chosen[..., slot, :, None].to(z.dtype) * z).flatten(-2)
        rows, z = y.reshape(-1, y.shape[-1]), z.reshape(-1, z.shape[-1])
        return torch.addmm(rows, z.to(y.dtype), self.B.to(y.dtype).t(), alpha=self.scale).view_as(y)

    def add_dropped(self, y: Tensor, x: Tensor) -> NoReturn:
        """There is no y to add to: each expert has one of its own."""
        raise AssertionError("the layers of an MLP are computed by `beside`")

    def weight(self) -> NoReturn:
        """There is none."""
        raise AssertionError("what depends on x is no matrix, and the rules keep it from whoever needs one")

    def start(self, generator: torch.Generator) -> None:
        """As in LoRA."""
        uniform(self.A, generator)
        nn.init.zeros_(self.B)


class Opening(Layer):
    """A layer that widens: what comes out has the experts of each token one after the other, [top·rows, ...]."""

    def beside(self, base: Base, x: Tensor, dropped: Tensor) -> Tensor:
        """W0·x is computed once."""
        self.mlp.decide(x)
        y = base.module(x)
        return torch.cat([self.add_slot(y, dropped, slot) for slot in range(self.mlp.top)])


class Closing(Layer):
    """The layer that narrows, and adds the experts up."""

    def __init__(self, place: Place, count: int, top: int) -> None:
        """The router reads what the MLP reads, which is as wide as what it writes."""
        super().__init__(place, count, top)
        self.router = nn.Parameter(torch.zeros(count, place.base.out_features))
        self.mlp.closing = self

    def beside(self, base: Base, x: Tensor, dropped: Tensor) -> Tensor:
        """Σ weights·(W0·x_n + b0 + ΔW_n·x_n); the weights of a token add up to 1, so the bias is there once."""
        mlp = self.mlp
        mlp.read = None
        slots = zip(base.module(x).chunk(mlp.top), dropped.chunk(mlp.top), strict=True)
        each = [self.add_slot(y, part, slot) for slot, (y, part) in enumerate(slots)]
        weights = mlp.weights.to(each[0].dtype).unbind(-1)
        return torch.stack([weight[..., None] * y for weight, y in zip(weights, each, strict=True)]).sum(0)

    def start(self, generator: torch.Generator) -> None:
        """The router, too."""
        super().start(generator)
        uniform(self.router, generator)


def make(place: Place, count: int, top: int) -> Layer:
    """What a layer is shows in its shape."""
    kind = Opening if place.base.in_features < place.base.out_features else Closing
    return kind(place, count, top)


def shapes(in_features: int, out_features: int, r: int, count: int, top: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a layer."""
    own = {"A": (count * r, in_features), "B": (out_features, count * r)}
    return own if in_features < out_features else own | {"router": (count, out_features)}


class Spec(Protocol):
    """What is asked about a planned layer."""

    name: str
    in_features: int
    out_features: int


def misfit(layers: Iterable[Spec], others: Iterable[str]) -> str | None:
    """What keeps these layers from being MLPs; a layer left out would not know the experts apart."""
    blocks: defaultdict[str, list[Spec]] = defaultdict(list)
    for layer in layers:
        blocks[owner(layer.name)].append(layer)
    left = next((other for other in others if owner(other) in blocks), None)
    if left is not None:
        return f"{left} is left out: ffn_experts needs all layers of an MLP"
    for name, found in blocks.items():
        ends = [layer for layer in found if layer.in_features > layer.out_features]
        begins = {layer.in_features for layer in found if layer.in_features < layer.out_features}
        if len(ends) != 1 or begins != {ends[0].out_features} or len(found) < 2:
            return f"{name or 'the model'} is no MLP: ffn_experts needs layers that widen and one that narrows again"
    return None


def owner(layer: str) -> str:
    """The module that a layer is in."""
    return layer.rpartition(".")[0]
