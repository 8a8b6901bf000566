"""vb_lora: A and B are cut into short vectors, each a mixture of the k best of one bank of vectors. arXiv:2405.15179

The bank is common to all layers and both factors, and trains, as do the scores by which the vectors are chosen. Saved
are the bank, and of every short vector which k and how much of each: some bytes. `length` has to divide both sides of
every layer.
"""

import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from lora_cli.adapter.delta import Factored, Place, Shape
from lora_cli.recipe.schema import Section

needs = {"init.own": "it starts from a random bank", "scale.constant": "the bank has a scale of its own"}
forbids = {
    "base.embedding": "`length` would have to divide the vocabulary",
    "lora_bias": "it has none",
    "trainable.lora_fa": "its A is made of scores and a bank: there is no A to freeze",
    "trainable.only_a": "its B is made of scores and a bank: there is no B to freeze",
    "optimizer.lora_plus": "it has no B",
    "lifecycle.restart": "all layers share one bank, which cannot start anew for one of them",
}
approximates = (
    "ΔW is not zero at first, but some ten thousandths of W0, as in the paper: nothing in the bank is zero"
)


class Settings(Section):
    """Settings in a recipe: `{vb_lora: {vectors: 256, length: 64, k: 2}}`."""

    vectors: Annotated[int, Field(ge=2, le=2**15)] = Field(default=256, description="Vectors in the bank.")
    length: Annotated[int, Field(ge=1)] = Field(
        default=256, description="Of a vector; divides the inputs and outputs of every layer."
    )
    k: Annotated[int, Field(ge=1)] = Field(default=2, description="Vectors that are mixed.")


class VBLoRA(Factored):
    """The layer's scores, and the bank [vectors, length] of all layers."""

    compact = True

    def __init__(self, place: Place, vectors: int, length: int, k: int) -> None:
        """Scores of zero."""
        super().__init__(place)
        self.k, self.r = k, place.r
        self.bank = place.shared.tensor("bank", _bank)
        sizes = shapes(place.base.in_features, place.base.out_features, place.r, vectors, length)
        self.scores_A = nn.Parameter(torch.zeros(sizes["scores_A"]))
        self.scores_B = nn.Parameter(torch.zeros(sizes["scores_B"]))

    def start(self, generator: torch.Generator) -> None:
        """Scores from N(0, 0.1²)."""
        nn.init.normal_(self.scores_A, std=0.1, generator=generator)
        nn.init.normal_(self.scores_B, std=0.1, generator=generator)

    def up(self) -> Tensor:
        """B: its columns are cut."""
        return self._mixed(self.scores_B).transpose(1, 2).reshape(-1, self.r)

    def down(self) -> Tensor:
        """A: its rows are cut."""
        return self._mixed(self.scores_A).flatten(1)

    def _mixed(self, scores: Tensor) -> Tensor:
        best, which = scores.topk(self.k, -1)
        return (best.softmax(-1)[..., None] * self.bank[which]).sum(-2)

    def packed(self) -> dict[str, Tensor]:
        """Of each short vector which k, in one byte where that is enough, and how much of all but the last."""
        found: dict[str, Tensor] = {}
        for factor, scores in (("A", self.scores_A), ("B", self.scores_B)):
            best, which = scores.detach().topk(self.k, -1)
            found[f"which_{factor}"] = which.to(torch.uint8 if len(self.bank) <= 2**8 else torch.int16)
            found[f"share_{factor}"] = best.softmax(-1)[..., :-1]
        return found

    def unpack(self, tensors: dict[str, Tensor]) -> None:
        """Scores that choose the same; those of all other vectors are −∞."""
        for factor, scores in (("A", self.scores_A), ("B", self.scores_B)):
            share = tensors[f"share_{factor}"].to(scores.device)
            whole = torch.cat([share, 1 - share.sum(-1, keepdim=True)], -1).clamp(min=0)
            which = tensors[f"which_{factor}"].to(scores.device).long()
            scores.copy_(torch.full_like(scores, -math.inf).scatter(-1, which, whole.log()))


make = VBLoRA


def _bank(shape: Shape, generator: torch.Generator) -> Tensor:
    """U(−0.02, 0.02)."""
    return torch.empty(shape).uniform_(-0.02, 0.02, generator=generator)


def problem(in_features: int, out_features: int, r: int, vectors: int, length: int, k: int) -> str | None:
    """What keeps a layer of this shape from being adapted."""
    if in_features % length or out_features % length:
        both = math.gcd(in_features, out_features)
        return f"length = {length} has to divide both sides of every layer; those of this one have {both} in common"
    return f"k = {k} is more than the {vectors} vectors of the bank" if k > vectors else None


def shapes(
    in_features: int, out_features: int, r: int, vectors: int, length: int, **_: Any
) -> dict[str, Shape]:
    """The tensors of a layer."""
    return {
        "scores_A": (r, in_features // length, vectors),
        "scores_B": (out_features // length, r, vectors),
    }


def packed_shapes(
    in_features: int, out_features: int, r: int, vectors: int, length: int, k: int
) -> dict[str, Shape]:
    """What is saved of them."""
    cut = {"A": (r, in_features // length), "B": (out_features // length, r)}
    return {
        f"{key}_{factor}": (*shape, n)
        for factor, shape in cut.items()
        for key, n in (("which", k), ("share", k - 1))
    }


def shared_shapes(
    layer: str, in_features: int, out_features: int, r: int, vectors: int, length: int, **_: Any
) -> dict[str, Shape]:
    """The bank, which all layers have in common."""
    return {"bank": (vectors, length)}
