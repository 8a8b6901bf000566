"""random_projection: what stays frozen is drawn from N(0, 1/r), so that on average it projects onto everything.

E[AᵀA] = I for LoRA's A, the random half of Flora (arXiv:2402.03293); with `delta: two_sided` the same for P and Q.
What trains starts at zero, and so the model as the base.
"""

from torch import nn

from lora_cli.adapter.delta import LowRank
from lora_cli.adapter.start import Start


def init(delta: LowRank, start: Start) -> None:
    """Draw A, or P and Q."""
    r = delta.A.shape[0]
    factors = dict(delta.named_parameters())
    for name in ("P", "Q") if "P" in factors else ("A",):
        nn.init.normal_(factors[name], std=r**-0.5, generator=start.generator)
    for name in ("A", "B") if "P" in factors else ("B",):
        nn.init.zeros_(factors[name])
