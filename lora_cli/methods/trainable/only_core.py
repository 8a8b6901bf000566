"""only_core: A and B stay at their first values; what stands between them trains. arXiv:2405.17604

Of `delta: core` the r² numbers of C, of `delta: gated` the r gates E.
"""

needs = {
    "delta.core or delta.gated": "there is nothing between A and B that could train",
    "init.closed or init.small or init.svd_of_w": "A and B stay as they are, so neither may start at zero",
}
forbids = {
    **dict.fromkeys(
        ("rank.prilora", "lifecycle.roselora", "lifecycle.sparse_adapter"),
        "it prunes factors that train, and A and B stay as they are",
    ),
    "optimizer.lora_plus": "with A and B frozen there is one rate only: set train.learning_rate",
    "rank.adalora": "it weighs the gradients of A and B, which have none",
    "rank.dora_dynamic": "it keeps the columns of A and B even, which stay as they are",
}


def trains(name: str) -> bool:
    """Everything but A and B."""
    return name not in ("A", "B")
