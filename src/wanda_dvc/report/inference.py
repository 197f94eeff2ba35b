"""Intervals and paired tests: pure functions of losses and answers. scipy, which is an extra, loads when one is made.

Windows and items are treated as independent. Windows of one text are not quite, so the interval of a single perplexity
is somewhat too narrow. This affects a paired ratio less, because both models read the same windows.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95


class Estimate(NamedTuple):
    """A value with its two-sided interval at `LEVEL`, and, of a difference, the p-value of there being none."""

    value: float
    low: float
    high: float
    p: float = math.nan

    def within(self, low: float, high: float) -> "Estimate":
        """The same with an interval that is cut off where values are impossible; it covers the truth as often."""
        return self._replace(low=max(low, self.low), high=min(high, self.high))


def perplexity(losses: Sequence[float], predictions: Sequence[int]) -> Estimate | None:
    """The exponential of the mean loss over windows, weighted by their predictions, with a t interval on the mean.

    `losses` are windows' means in nats. None if one of them is not finite, or there are fewer than two.
    """
    mean = _mean(np.asarray(losses, float), np.asarray(predictions, float))
    return mean and Estimate(_exp(mean.value), _exp(mean.low), _exp(mean.high))


def ratio(losses: Sequence[float], others: Sequence[float], predictions: Sequence[int]) -> Estimate | None:
    """Perplexity of the first model over the second's on the same windows: the t interval and test of paired losses.

    None as for `perplexity`.
    """
    mean = _mean(np.asarray(losses, float) - np.asarray(others, float), np.asarray(predictions, float))
    return mean and Estimate(_exp(mean.value), _exp(mean.low), _exp(mean.high), mean.p)


def accuracy(right: Sequence[bool]) -> Estimate:
    """The fraction of items answered rightly, with Wilson's interval (Wilson 1927)."""
    from scipy import stats

    test = stats.binomtest(sum(right), len(right))
    interval = test.proportion_ci(LEVEL, method="wilson")
    return Estimate(test.statistic, interval.low, interval.high)


class Disagreement(NamedTuple):
    """Of the items that two models answered: how many only the first got right, how many only the second."""

    first: int
    second: int
    p: float


def mcnemar(right: Sequence[bool], others: Sequence[bool]) -> Disagreement:
    """McNemar's exact test on the same items: were both equally good, each disagreement would be a fair coin."""
    from scipy import stats

    first = sum(a and not b for a, b in zip(right, others, strict=True))
    second = sum(b and not a for a, b in zip(right, others, strict=True))
    p = stats.binomtest(first, first + second).pvalue if first + second else 1.0
    return Disagreement(first, second, float(p))


def mean_of_tasks(tasks: Sequence[Sequence[float]]) -> Estimate | None:
    """The mean over tasks of each task's mean over items, tasks counting equally; the test is of its being 0.

    One task: a list of 0 and 1, or, for two models, of the differences −1, 0, 1 item by item. The variance is the sum
    of the tasks' own, the t distribution's degrees of freedom Welch's and Satterthwaite's. The tasks are those asked,
    not a sample of tasks. None where a task has fewer than two items, or where all values of each task are the same and
    the mean is not 0: there is nothing by which to judge it.
    """
    if any(len(task) < 2 for task in tasks):
        return None
    value = float(np.mean([np.mean(task) for task in tasks]))
    parts = [float(np.var(task, ddof=1)) / len(task) / len(tasks) ** 2 for task in tasks]
    if not (variance := float(sum(parts))):
        return Estimate(value, value, value, 1.0) if value == 0 else None
    sizes = [len(task) for task in tasks]
    freedom: float = variance**2 / sum(part**2 / (size - 1) for part, size in zip(parts, sizes, strict=True))
    return _student(value, math.sqrt(variance), freedom)


def mean_accuracy(tasks: Sequence[Sequence[bool]]) -> Estimate | None:
    """The mean over tasks of the fraction answered correctly, with `mean_of_tasks`' interval cut off at 0 and 1."""
    found = mean_of_tasks([[float(right) for right in task] for task in tasks])
    return found and found.within(0, 1)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjustment (1979) of several tests' p-values: one below α after it is so with all tests counted."""
    order = sorted(range(len(p)), key=p.__getitem__)
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = largest
    return adjusted


def _mean(values: "np.ndarray", weights: "np.ndarray") -> Estimate | None:
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    share = weights / weights.sum()
    mean = float(share @ values)
    variance = float(share**2 @ (values - mean) ** 2) * len(values) / (len(values) - 1)
    if variance == 0:
        return Estimate(mean, mean, mean, 1.0 if mean == 0 else 0.0)
    return _student(mean, math.sqrt(variance), len(values) - 1)


def _student(value: float, error: float, freedom: float) -> Estimate:
    from scipy import stats

    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
    return Estimate(value, value - half, value + half, float(2 * stats.t.sf(abs(value) / error, freedom)))


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
