"""svd_of_w: B = U, A = Σ·Vᵀ of the r largest singular values of W0; C between them zero, or tiny. arXiv:2405.17604

The frame of LoRA-XS, in which only C trains: ΔW moves along what W0 does most. The authors draw C from N(0, (1e-5)²);
at zero, as here, the model starts as the base exactly, and C has a gradient from the first step on.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from lora_cli.adapter.delta import LowRank
from lora_cli.adapter.start import Start
from lora_cli.recipe.schema import Section

needs = {"delta.core": "without C at zero the model would not start as the base"}


class Settings(Section):
    """Settings in a recipe: `{svd_of_w: {std: 1e-5}}`."""

    std: Annotated[float, Field(ge=0)] = Field(default=0.0, description="Spread of the entries of C.")


def init(delta: LowRank, start: Start, std: float) -> None:
    """Where r is larger than the rank of W0, the rest of A and B stays zero."""
    U, S, Vt = torch.linalg.svd(start.base.weight(), full_matrices=False)
    r = min(delta.A.shape[0], len(S))
    nn.init.zeros_(delta.A)
    nn.init.zeros_(delta.B)
    delta.B[:, :r] = U[:, :r]
    delta.A[:r] = S[:r, None] * Vt[:r]
    nn.init.normal_(delta.get_parameter("C"), std=std, generator=start.generator)
