"""Intervals and paired tests: pure functions of losses and answers, without torch.

Windows and items count as independent. Windows of one text are slightly dependent, so the interval of a single
perplexity is somewhat too narrow. A paired ratio is less affected, because both models read the same windows.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from wanda_dvc.reading import DIVERGED

LEVEL = 0.95
ALPHA = 0.05  # 1 - LEVEL, without its rounding; p-values below it are beyond noise


class Estimate(NamedTuple):
    """A value with its two-sided interval at `LEVEL`; a difference also has the p-value of no difference."""

    value: float
    low: float = math.nan  # not known
    high: float = math.nan
    p: float = math.nan

    @property
    def record(self) -> dict[str, float | str]:
        """Its known numbers, as JSON has them."""
        return {key: DIVERGED if math.isinf(x) else x for key, x in self._asdict().items() if not math.isnan(x)}

    def within(self, low: float, high: float) -> "Estimate":
        """Return the estimate with its interval cut to possible values; the coverage does not change. NaN stays."""
        return self._replace(low=max(self.low, low), high=min(self.high, high))  # NaN first: max and min return it


def perplexity_interval(losses: Sequence[float], predictions: Sequence[int]) -> Estimate | None:
    """Return exp(mean loss over windows, weighted by their predictions), with a t interval on the mean.

    `losses` are windows' means in nats. None if one is not finite, for fewer than two, or if all are equal and not 0.
    """
    interval = ratio(losses, [0.0] * len(losses), predictions)
    return interval and interval.within(1, math.inf)  # a mean loss is at least 0


def ratio(losses: Sequence[float], base_losses: Sequence[float], predictions: Sequence[int]) -> Estimate | None:
    """Return a model's perplexity over a base's on the same windows. None as for `perplexity_interval`."""
    difference = mean_difference(losses, base_losses, predictions)
    if difference is None:
        return None
    return Estimate(_exp(difference.value), _exp(difference.low), _exp(difference.high), difference.p)


def _exp(x: float) -> float:
    return math.inf if x >= 709 else math.exp(x)  # the largest float is exp(709.8)


def mean_difference(values: Sequence[float], base: Sequence[float], predictions: Sequence[int]) -> Estimate | None:
    """Return a model's mean minus a base's on the same windows: t interval and test of paired means.

    `values` and `base` are windows' means over their predictions, which weight them: scipy's tests have no weights.
    Equal weights give Student's test for pairs. None as for `perplexity_interval`.
    """
    differences, weights = np.subtract(values, base), np.divide(predictions, sum(predictions))
    if len(differences) < 2 or not np.isfinite(differences).all():
        return None
    mean = float(weights @ differences)
    variance = float(weights**2 @ (differences - mean) ** 2) * len(differences) / (len(differences) - 1)
    if variance <= (1e-9 * mean) ** 2:  # apart from rounding, all are equal
        return None if mean else Estimate(mean, p=1.0)
    return _student(mean, math.sqrt(variance), len(differences) - 1)


def accuracy_interval(right: Sequence[bool]) -> Estimate:
    """Return the fraction of correct answers, with Wilson's interval (Wilson 1927)."""
    from scipy.stats import binomtest

    count = sum(right)
    interval = binomtest(count, len(right)).proportion_ci(LEVEL, method="wilson")
    return Estimate(count / len(right), float(interval.low), float(interval.high)).within(0, 1)


def mean_of_tasks(tasks: Sequence[Sequence[float]], *, least: int) -> Estimate | None:
    """Return the unweighted mean over tasks of each task's mean over items; the test's hypothesis is a mean of 0.

    One task: a list of 0 and 1, or, for two models, of the differences −1, 0, 1 item by item. The interval is cut to
    [least, 1]. The variance is the sum of the tasks' variances, with Welch's and Satterthwaite's degrees of freedom for
    the t distribution. The tasks are fixed, not a sample of tasks. None if a task has fewer than two items, or if no
    variance is known although the mean is not 0. A constant mean of 0 has no interval.
    """
    if any(len(task) < 2 for task in tasks):
        return None
    value = float(np.mean([np.mean(task) for task in tasks]))
    variances = [float(np.var(task, ddof=1)) / len(task) / len(tasks) ** 2 for task in tasks]
    variance = sum(variances)
    if not variance:
        return Estimate(value, p=1.0) if value == 0 else None
    terms = [of_task**2 / (len(task) - 1) for of_task, task in zip(variances, tasks, strict=True)]
    return _student(value, math.sqrt(variance), variance**2 / sum(terms)).within(least, 1)


def mcnemar(right: Sequence[bool], base: Sequence[bool]) -> float:
    """Return the p-value of McNemar's exact test on the same items: for equal models, disagreements are fair coins."""
    from scipy.stats import binomtest

    pairs = list(zip(right, base, strict=True))
    first, second = pairs.count((True, False)), pairs.count((False, True))
    return float(binomtest(first, first + second).pvalue) if first + second else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values adjusted by Holm (1979): comparing them with α bounds the error of all tests together."""
    order = sorted(range(len(p)), key=p.__getitem__)
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = largest
    return adjusted


def _student(value: float, standard_error: float, df: float) -> Estimate:
    """Return Student's t interval of a value with a standard error, and the p-value of 0."""
    from scipy.stats import t

    low, high = t.interval(LEVEL, df, value, standard_error)
    return Estimate(value, float(low), float(high), float(2 * t.sf(abs(value) / standard_error, df)))
