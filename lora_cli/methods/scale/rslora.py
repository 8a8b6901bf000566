"""rslora: s = alpha / √r, stable for any rank. arXiv:2312.03732

With alpha / r the gradient that reaches the factors shrinks as r grows; with alpha / √r a larger r keeps helping.
"""

import math


def scale(alpha: float, r: int) -> float:
    """Theorem 3.2 of the paper."""
    return alpha / math.sqrt(r)
