"""The rate of this machine's matrix products on a model's own shapes: forward and dX of every linear, and the head.

usage: gemm.py '{"model": ..., "tokens": 512, "labelled": 0.25}' -> one line of JSON: sizes, and FLOP/s
"""

import json
import sys
import time
from collections import Counter
from dataclasses import asdict

import torch
from flops import Sizes
from ours import recipe_of

from lora_cli import model as models
from lora_cli.model import LanguageModel
from lora_cli.run import prepare

Shape = tuple[int, int]
"""in, out."""

SECONDS = 0.25
"""That one shape is measured for, at least."""


def shapes_of(model: str) -> tuple[Sizes, Counter[Shape], Shape]:
    """The sizes of a model with its adapter, its linears' shapes with their number, and its head's shape."""
    recipe = recipe_of(model, 1, 1)
    skeleton = models.skeleton(recipe.model)
    ends = models.ends_of(skeleton)
    plan = prepare.plan_for(recipe, LanguageModel(skeleton, None, ends, ()))
    shapes = Counter((spec.in_features, spec.out_features) for spec in plan.layers)
    out, width = models.end_modules(skeleton)[1].weight.shape
    config = skeleton.config
    heads = config.num_attention_heads * getattr(config, "head_dim", width // config.num_attention_heads)
    sizes = Sizes(
        frozen=sum(i * o * count for (i, o), count in shapes.items()),
        head=out * width,
        lora=sum(spec.r * (spec.in_features + spec.out_features) for spec in plan.layers),
        attention=config.num_hidden_layers * heads,
    )
    return sizes, shapes, (width, out)


def seconds_of(shape: Shape, tokens: int, device: torch.device, dtype: torch.dtype) -> float:
    """Median time of x·Wᵀ and dX = dY·W."""
    width, out = shape
    W = torch.randn(out, width, device=device, dtype=dtype)
    x = torch.randn(tokens, width, device=device, dtype=dtype)
    y = torch.randn(tokens, out, device=device, dtype=dtype)
    timed = []
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(timed) < 5:
        began = time.perf_counter()
        torch.mm(x, W.t())
        torch.mm(y, W)
        if device.type == "cuda":
            torch.cuda.synchronize()
        timed.append(time.perf_counter() - began)
    return sorted(timed)[len(timed) // 2]


def probe(size: int = 1024) -> float:
    """FLOP/s of square products over about a second: whether the machine is as fast as it was."""
    x = torch.randn(size, size)
    done, began = 0, time.perf_counter()
    while (taken := time.perf_counter() - began) < 1:
        torch.mm(x, x)
        done += 1
    return 2 * size**3 * done / taken


def main(model: str, tokens: int, labelled: float) -> None:
    """Each shape weighs as much as a step of the model uses it."""
    sizes, shapes, head = shapes_of(model)
    used = [(shape, tokens, count) for shape, count in shapes.items()]
    used.append((head, max(round(tokens * labelled), 1), 1))
    flops = sum(4 * shape[0] * shape[1] * rows * count for shape, rows, count in used)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = models.stored_dtype(recipe_of(model, 1, 1).model, device)
    seconds = sum(seconds_of(shape, rows, device, dtype) * count for shape, rows, count in used)
    print(json.dumps({"sizes": asdict(sizes), "flops_per_second": flops / seconds}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
