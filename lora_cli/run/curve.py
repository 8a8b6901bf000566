"""A loss curve that can be read."""


def smoothed(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """(step, loss) -> (step, mean over the last twentieth of the run)."""
    window = max(len(points) // 20, 1)
    means: list[tuple[int, float]] = []
    for index, (step, _) in enumerate(points):
        recent = [loss for _, loss in points[max(0, index - window + 1) : index + 1]]
        means.append((step, sum(recent) / len(recent)))
    return means
