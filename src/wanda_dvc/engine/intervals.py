"""Intervals of a mean over windows: pure functions of numbers, without torch."""

import math
from collections.abc import Sequence

LEVEL = 0.95


def mean_interval(
    values: Sequence[float], weights: Sequence[float], within: tuple[float, float] = (-math.inf, math.inf)
) -> dict[str, float]:
    """Return the weighted `mean`, and the `low` and `high` end of its t interval; of one value, the mean alone.

    The ends are cut to possible values, `within`.
    """
    from scipy.special import stdtrit

    total = math.fsum(weights)
    mean = math.fsum(value * weight for value, weight in zip(values, weights, strict=True)) / total
    count = len(values)
    if count < 2:
        return {"mean": mean}
    variance = math.fsum((weight / total * (value - mean)) ** 2 for value, weight in zip(values, weights, strict=True))
    half = float(stdtrit(count - 1, (1 + LEVEL) / 2)) * math.sqrt(variance * count / (count - 1))
    low, high = within
    return {"mean": mean, "low": max(low, mean - half), "high": min(high, mean + half)}
