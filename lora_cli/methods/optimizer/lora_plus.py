"""lora_plus: AdamW in which B learns `ratio` times as fast as A. arXiv:2402.12354

B starts at zero and has the larger steps to make. Biases, norms and magnitudes keep the recipe's rate, and so do
weights trained in full; weight decay is the recipe's.
"""

from typing import Annotated, Any

from pydantic import Field
from torch.optim import AdamW, Optimizer

from lora_cli.recipe.schema import Section, TrainRecipe

forbids = {
    "trainable.lora_fa": "with A frozen there is one rate only: set train.learning_rate",
    "trainable.only_a": "with B frozen there is one rate only: set train.learning_rate",
    "delta.miss": "it has no A",
    "delta.vera": "its A and B are frozen",
    "delta.whole": "it has neither A nor B",
    **{
        f"delta.{name}": "it has no B"
        for name in ("fourierft", "hra", "ia3", "none", "oft", "sam_parser", "spectral_rotate", "svdiff")
    },
}


class Settings(Section):
    """Settings in a recipe: `{lora_plus: {ratio: 16}}`."""

    ratio: Annotated[float, Field(gt=0)] = Field(
        default=16.0, description="Learning rate of B over that of A."
    )


def make(groups: list[dict[str, Any]], train: TrainRecipe, adapter: object, ratio: float) -> Optimizer:
    """Each group in two: the B of every layer, and the rest. `lr_ratio` is what the schedule is multiplied with."""
    split: list[dict[str, Any]] = []
    for group in groups:
        named = list(zip(group["names"], group["params"], strict=True))
        fast = [(name, p) for name, p in named if name.endswith(".B")]
        slow = [(name, p) for name, p in named if not name.endswith(".B")]
        for chosen, lr_ratio in ((fast, ratio), (slow, 1.0)):
            names, params = [name for name, _ in chosen], [p for _, p in chosen]
            split.append({**group, "names": names, "params": params, "lr_ratio": lr_ratio})
    split = [group for group in split if group["params"]]
    device = split[0]["params"][0].device.type
    fused = device in ("cuda", "cpu")
    return AdamW(split, lr=train.learning_rate, betas=train.betas, fused=fused)
