"""nested: LoRA whose first b components are LoRA of rank b, for every b ≤ r. arXiv:2210.07558

ΔW = (α/b)·B[:, :b]·A[:b]. While it trains `rank: dylora` chooses b anew for every step; evaluated and saved is all
of it.
"""

from lora_cli.adapter.nested import Nested

needs = {"rank.dylora": "nothing else chooses b, and with all components it is `lowrank`"}
forbids = {
    "a start that stands for a part of W0": "what is taken off W0 would be that of one b only",
    "init.own": "A and B would both be zero, from where no step leads",
    "combine.dora": "its lengths would be those of one b only",
}

make = Nested


def shapes(in_features: int, out_features: int, r: int) -> dict[str, tuple[int, ...]]:
    """The tensors that make up ΔW."""
    return {"A": (r, in_features), "B": (out_features, r)}
