"""One choice for each of many things, such that the costs sum up to the least that a budget allows. Exact.

The integer programme of LQ-LoRA, arXiv:2311.12023, 3.2: one row for the budget, else one choice a thing. Its linear
relaxation gives a price λ of size; what a choice costs more at this price than the thing's best bounds the total from
below. What is certain to end above a total that is known is left out, and of partial choices those that another one
beats in size and cost (Pisinger, A minimal algorithm for the multiple-choice knapsack problem, 1995).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
EXACT = 1e-12
"""Share of the total that sums of float64 may be off by."""


def cheapest(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """The choice of each thing, of which choice c costs `costs[i][c]` and takes `sizes[i][c]`.

    Raises:
        ValueError: the smallest of all are more than the budget.
    """
    cost, size = np.array(costs, np.float64), np.array(sizes, np.int64)
    if size.min(1).sum() > budget:
        raise ValueError("the smallest of all are more than the budget")
    price = _price(cost, size, budget)
    at_price = cost + price * size
    first = np.lexsort((size, at_price))[:, 0]  # of equal ones the smallest
    more = at_price - at_price.min(1, keepdims=True)
    return _search(more, size, first, price, budget, EXACT * float(at_price.min(1).sum()))


def _price(cost: Floats, size: Ints, budget: int) -> float:
    """Of size, at which the cheapest choices take as much as the budget, or more and less: the dual's largest point."""
    steps = sorted((step for each in zip(cost, size, strict=True) for step in _steps(*each)), reverse=True)
    left = budget - int(size.min(1).sum())
    for price, more in steps:
        left -= more
        if left < 0:
            return price
    return 0.0


def _steps(cost: Floats, size: Ints) -> list[tuple[float, int]]:
    """(What each further piece of size saves, how large it is) from the smallest choice on along the convex hull."""
    at = int(np.lexsort((cost, size))[0])
    found: list[tuple[float, int]] = []
    while (cost < cost[at]).any():
        larger = np.flatnonzero((cost < cost[at]) & (size > size[at]))
        saved = (cost[at] - cost[larger]) / (size[larger] - size[at])
        best = larger[saved == saved.max()][-1]
        found.append((float(saved.max()), int(size[best] - size[at])))
        at = int(best)
    return found


def _search(more: Floats, size: Ints, first: Ints, price: float, budget: int, slack: float) -> list[int]:
    """The choices of the least Σ more + price·(budget − Σ size) within the budget; none of both is below zero."""
    count = len(more)
    least_after = np.append(np.cumsum(size.min(1)[::-1])[::-1], 0)
    first_after = np.append(np.cumsum(size[np.arange(count), first][::-1])[::-1], 0)
    held, paid, known = np.zeros(1, np.int64), np.zeros(1), np.inf
    stages: list[tuple[Ints, Ints]] = []
    for i in range(count):
        sizes, costs = held[:, None] + size[i], paid[:, None] + more[i]
        kept = np.flatnonzero((sizes + least_after[i + 1] <= budget) & (costs <= known + slack))
        held, paid = sizes.flat[kept], costs.flat[kept]
        order = np.lexsort((paid, held))
        total = paid[order] - price * held[order]
        order = order[np.append(True, total[1:] < np.minimum.accumulate(total)[:-1])]
        held, paid, kept = held[order], paid[order], kept[order]
        stages.append((kept // size.shape[1], kept % size.shape[1]))
        ends = held + first_after[i + 1]
        fits = ends <= budget
        if fits.any():
            known = min(known, float((paid + price * (budget - ends))[fits].min()))
    at, chosen = int((paid - price * held).argmin()), []
    for before, choice in reversed(stages):
        chosen.append(int(choice[at]))
        at = int(before[at])
    return chosen[::-1]
