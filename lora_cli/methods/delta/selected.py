"""selected: ΔW = s·B·diag(softmax(E))·A, each of the r components with a learned share. arXiv:2403.09113

Shares add up to 1, so that ΔW is about r times smaller than LoRA's. Once `rank: autolora` has decided by them which
components there are, it is plain LoRA of these: all count in full.
"""

from lora_cli.adapter.delta import Shape
from lora_cli.adapter.selected import Selected

FILLED = "it fills A and B, and the model would not start as the base"
needs = {"rank.autolora": "nothing else decides by the shares; with gates that stay it is `gated`"}
forbids = {
    "a start that stands for a part of W0": "what is taken off W0 would not be what the shares leave of B·A",
    "init.closed": FILLED,
    "init.small": FILLED,
    "init.own": "A and B would both be zero, from where no step leads",
}

make = Selected


def shapes(in_features: int, out_features: int, r: int) -> dict[str, Shape]:
    """The tensors that make up ΔW."""
    return {"A": (r, in_features), "B": (out_features, r), "E": (r,)}
