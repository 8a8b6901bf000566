"""alpha_over_r: s = alpha / r. arXiv:2106.09685

Raising r with alpha fixed keeps the size of the first steps but weakens what a large r can add.
"""


def scale(alpha: float, r: int) -> float:
    """The paper's section 4.1."""
    return alpha / r
