"""factors: ΔW = s·Σ w_k·b_k·a_kᵀ of r factors that are chosen from two pools for each document. arXiv:2402.15896

Conditional mixture-of-LoRA. From the mean of the document's prompt one router chooses r of the a, another one r of
the b, which also depends on the a that were chosen; the weights of the chosen ones have a mean of 1. A document is
decided upon once, from what is read before its answer: what is generated is computed as the prompt was, and no token
depends on one behind it. Depends on the input: never merged.
"""

from typing import Annotated, NoReturn

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from lora_cli.adapter.base import Base
from lora_cli.adapter.delta import Delta, Place
from lora_cli.adapter.reading import Reading, rows_of
from lora_cli.adapter.routed import FORBIDS
from lora_cli.adapter.start import uniform
from lora_cli.errors import ExitCode, UserError
from lora_cli.recipe.schema import Section

mergeable = False
needs = {"init.own": "its routers have to be drawn, too"}
forbids = FORBIDS | {
    "base.expert": "an expert is given some of the tokens only, and not where they stand",
}


class Settings(Section):
    """Settings in a recipe: `{factors: {pool: 4}}`."""

    pool: Annotated[int, Field(ge=2)] = Field(default=4, description="Factors in a pool, as a multiple of r.")


Chosen = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of each document the a, their weights, the b, their weights, [documents, r] each."""


class Factors(Delta):
    """A [pool·r, in] holds the a, B [out, pool·r] the b."""

    def __init__(self, place: Place, pool: int) -> None:
        """`router` chooses among the a, `router_b` and `condition` among the b."""
        super().__init__(place.dropout)
        self.name = place.name
        self.scale, self.r, self.project = place.scale, place.r, place.base.project
        width, count = place.base.in_features, pool * place.r
        self.A = nn.Parameter(torch.zeros(count, width))
        self.B = nn.Parameter(torch.zeros(place.base.out_features, count))
        self.router = nn.Parameter(torch.zeros(count, width))
        self.router_b = nn.Parameter(torch.zeros(count, width))
        self.condition = nn.Parameter(torch.zeros(count, width))
        self.reader = place.shared.reader
        self.reader.wanted = True
        self.kept: tuple[Reading, Chosen] | None = None

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y + ΔW·x. The routers see all of x, whatever is dropped from the input of the factors."""
        return self._mix(y, self.dropped(x), *self._decide(x))

    def beside(self, base: Base, x: Tensor, dropped: Tensor) -> Tensor:
        """Return W0·x + b0 + ΔW·dropped."""
        return self._mix(base.module(x), dropped, *self._decide(x))

    def add_dropped(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y + ΔW·x."""
        return self._mix(y, x, *self._decide(x))

    def _decide(self, x: Tensor) -> tuple[Tensor, Chosen]:
        """The document of each token of x [rows, tokens, in], and what is chosen for the documents."""
        if x.ndim != 3:
            what, fix = (
                "is not given its tokens in rows, so their document is not known",
                "adapter.exclude_modules",
            )
            raise UserError(what, where=self.name, fix=f"leave it out with {fix}", code=ExitCode.MODEL)
        now = self.reader.now or rows_of(torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device))
        if self.kept is not None and self.kept[0] is now:
            return now.document[:, -1:].expand(x.shape[:-1]), self.kept[1]
        chosen = self.choose(self._means(x, now))
        self.kept = (now, chosen) if now.goes_on else None
        return now.document, chosen

    def _means(self, x: Tensor, now: Reading) -> Tensor:
        """Of the prompt of each document, float32 [documents, in]."""
        # What is no prompt is added to a document of its own, so that no shape depends on what the tokens say.
        number = torch.where(now.prompt, now.document, now.documents).flatten()
        tokens = x.flatten(0, 1).float()
        sums = tokens.new_zeros(now.documents + 1, x.shape[-1]).index_add(0, number, tokens)
        counts = tokens.new_zeros(now.documents + 1).index_add(0, number, torch.ones_like(tokens[:, 0]))
        return sums[:-1] / counts[:-1].clamp(min=1)[:, None]

    def choose(self, means: Tensor) -> Chosen:
        """From the mean of a prompt [documents, in]."""
        a, of_a = self._best(F.linear(means, self.router).softmax(-1))
        picked = (of_a[..., None] * self.A[a]).mean(1)
        b, of_b = self._best(
            F.linear(means, self.router_b).softmax(-1) + F.linear(picked, self.condition).softmax(-1)
        )
        return a, of_a, b, of_b

    def _best(self, shares: Tensor) -> tuple[Tensor, Tensor]:
        """The r largest shares of each document, best first, scaled to a mean of 1."""
        best = shares.topk(self.r, -1)
        return best.indices, best.values / best.values.mean(-1, keepdim=True)

    def _mix(self, y: Tensor, x: Tensor, document: Tensor, chosen: Chosen) -> Tensor:
        """All of a pool is computed, which is thin; then what is chosen is picked."""
        a, of_a, b, of_b = (each[document] for each in chosen)
        all_of_a = self.project(x, self.A.to(x.dtype))
        z = all_of_a.gather(-1, a) * (of_a * of_b).to(all_of_a.dtype)
        z = torch.zeros_like(all_of_a).scatter(-1, b, z)
        rows, z = y.reshape(-1, y.shape[-1]), z.reshape(-1, z.shape[-1])
        return torch.addmm(rows, z.to(y.dtype), self.B.to(y.dtype).t(), alpha=self.scale).view_as(y)

    def weight(self) -> NoReturn:
        """There is none."""
        raise AssertionError("what depends on x is no matrix, and the rules keep it from whoever needs one")

    def start(self, generator: torch.Generator) -> None:
        """As in LoRA, with routers that tell the factors apart."""
        for tensor in (self.A, self.router, self.router_b, self.condition):
            uniform(tensor, generator)
        nn.init.zeros_(self.B)


make = Factors


def shapes(in_features: int, out_features: int, r: int, pool: int) -> dict[str, tuple[int, ...]]:
    """The tensors that make up ΔW."""
    pools = {"A": (pool * r, in_features), "B": (out_features, pool * r)}
    return pools | dict.fromkeys(("router", "router_b", "condition"), (pool * r, in_features))


def problem(in_features: int, out_features: int, r: int, pool: int) -> str | None:
    """What keeps a layer from being adapted."""
    return (
        "one factor alone has no weight that a router could learn: r has to be 2 at least" if r < 2 else None
    )
