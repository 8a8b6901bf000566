"""Bits by layer: formats such that the squared errors of all layers sum up to the least that a budget allows.

LQ-LoRA, arXiv:2311.12023, 3.2 and 3.3. The authors take the error that their whole decomposition leaves with each
format; here it is that of its first turn, which one SVD tells for all formats: a start takes its thin part off W0, and
the rest is quantised. Other starts have W0 itself quantised. Where the start measures Fisher weights, an error counts
these, in all layers alike.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lora_cli import parts
from lora_cli.adapter.allot import cheapest
from lora_cli.adapter.base import Base
from lora_cli.adapter.plan import Plan, check_bits
from lora_cli.adapter.quantised import Quantised
from lora_cli.parts import Part

ROWS_AT_ONCE = 1024


def allotted(
    plan: Plan,
    budget: float,
    base_of: Callable[[str], Base],
    left: Callable[[str], Tensor],
    fisher: Mapping[str, Tensor],
) -> Plan:
    """The plan with a format for each quantised layer; one layer at a time is looked at.

    Args:
        plan: all layers in one format, whose file says which `FORMATS` there are.
        budget: bits a weight on average, all included.
        base_of: a layer's W0.
        left: what there is to quantise of it, float32 [out, in] on the CPU.
        fisher: layer -> means of the squared gradients of its rows, then of its columns; or nothing at all.

    Raises:
        UserError: there are fewer bits than all layers take at least.
    """
    check_bits(budget, {name: base_of(name) for name in plan.quantised}, plan.quantised)
    errors: list[list[float]] = []
    sizes: list[list[int]] = []
    numbers = 0
    for name, part in plan.quantised.items():
        base, W, counts = base_of(name), left(name), fisher[name] if fisher else None
        formats = [Part(part.name, settings) for settings in parts.load("base", part.name).FORMATS]
        errors.append([error(base, W, each, counts) for each in formats])
        sizes.append([size(W.numel(), each) for each in formats])
        numbers += W.numel()
    chosen = cheapest(errors, sizes, int(budget * numbers))
    found = zip(plan.quantised.items(), chosen, strict=True)
    quantised = {
        name: Part(part.name, parts.load("base", part.name).FORMATS[which]) for (name, part), which in found
    }
    return replace(plan, quantised=quantised, budget=None)


def error(base: Base, W: Tensor, part: Part, fisher: Tensor | None) -> float:
    """Σ F·(dq(q(W)) − W)², in float64, with F = 1 or, of means [out + in], the matrix of rank one that has these."""
    made = parts.load("base", part.name).quantise(base, W, **part.settings)
    off, total = made.dequantised(torch.float32) - W, 0.0
    rows, columns = _factors(W, fisher)
    for block, counts in zip(off.split(ROWS_AT_ONCE), rows.split(ROWS_AT_ONCE), strict=True):
        total += float(counts @ block.double().square() @ columns)
    return total


def _factors(W: Tensor, fisher: Tensor | None) -> tuple[Tensor, Tensor]:
    if fisher is None:
        return torch.ones(W.shape[0], dtype=torch.float64), torch.ones(W.shape[1], dtype=torch.float64)
    rows, columns = fisher.cpu().double().split([*W.shape])
    return rows / rows.mean().clamp(min=torch.finfo(torch.float64).tiny), columns


def size(numbers: int, part: Part) -> int:
    """Bits that so many weights take in a format."""
    return parts.load("base", part.name).bits_of(numbers, **part.settings)


def by_kind(model: nn.Module) -> dict[str, float]:
    """Last piece of the names of quantised layers -> bits that a weight of theirs takes on average, as it is kept."""
    kinds: dict[str, list[Quantised]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Quantised):
            kinds.setdefault(name.removesuffix(".base_layer").rpartition(".")[2], []).append(module)
    return {kind: _mean(layers) for kind, layers in kinds.items()}


def _mean(layers: Iterable[Quantised]) -> float:
    taken = [
        (8 * sum(map(_bytes, each.kept().values())), each.in_features * each.out_features) for each in layers
    ]
    return sum(bits for bits, _ in taken) / sum(numbers for _, numbers in taken)


def _bytes(tensor: Tensor) -> int:
    """Of all of it, where it is shared out, too."""
    return tensor.numel() * tensor.element_size()
