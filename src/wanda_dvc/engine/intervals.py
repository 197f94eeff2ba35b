"""Intervals of a mean over windows, without scipy: pure functions of numbers."""

import math
from collections.abc import Sequence
from functools import cache

LEVEL = 0.95


def mean_interval(
    values: Sequence[float], weights: Sequence[float], within: tuple[float, float] = (-math.inf, math.inf)
) -> dict[str, float]:
    """Return the weighted `mean`, and the `low` and `high` end of its t interval; of one value, the mean alone.

    The ends are cut to possible values, `within`.
    """
    total = math.fsum(weights)
    mean = math.fsum(value * weight for value, weight in zip(values, weights, strict=True)) / total
    count = len(values)
    if count < 2:
        return {"mean": mean}
    variance = math.fsum((weight / total * (value - mean)) ** 2 for value, weight in zip(values, weights, strict=True))
    half = quantile(count - 1) * math.sqrt(variance * count / (count - 1))
    low, high = within
    return {"mean": mean, "low": max(low, mean - half), "high": min(high, mean + half)}


@cache
def quantile(freedom: int) -> float:
    """Return the two-sided quantile at `LEVEL` of Student's t distribution, by bisection."""
    low, high = 0.0, 1.0
    while _within(high, freedom) < LEVEL:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < LEVEL else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """Return P(|T| ≤ t), by the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term = total = math.cos(angle) if odd else 1.0
    if freedom == 1:
        total = 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
