"""Counts the answers to multiple-choice questions that differ between two models: pure functions of answers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

Json = dict[str, Any]
ANSWERS = {"acc": "answer", "acc_norm": "answer_norm"}  # an item's key of the chosen answer, by metric


class Disagreement(NamedTuple):
    """Return two counts of items that two models answered: correct in the first only, and in the second only."""

    first: int
    second: int
    p: float


def mcnemar(right: Sequence[bool], others: Sequence[bool]) -> Disagreement:
    """Return the p-value of McNemar's exact test on the same items: for equal models, disagreements are fair coins."""
    first = sum(a and not b for a, b in zip(right, others, strict=True))
    second = sum(b and not a for a, b in zip(right, others, strict=True))
    return Disagreement(first, second, _fair_coins(first, second))


def _fair_coins(heads: int, tails: int) -> float:
    """Return the two-sided p-value of a binomial test: outcomes at least as uneven, in exact integers, over all."""
    coins = heads + tails
    uneven = ways = 1
    for count in range(min(heads, tails)):
        ways = ways * (coins - count) // (count + 1)
        uneven += ways
    return min(1.0, 2 * uneven / 2**coins)


class Answer(NamedTuple):
    """A model's answer to an item."""

    choice: int
    right: bool


class Flips(NamedTuple):
    """The items of a task, or of several, with another answer after pruning, by the answers before and after."""

    items: int  # all
    lost: int  # right → wrong
    gained: int  # wrong → right
    swapped: int  # from one wrong choice to another
    p: float  # McNemar's exact test on lost and gained

    @property
    def changed(self) -> int:
        """The number of changed answers."""
        return self.lost + self.gained + self.swapped

    @property
    def share(self) -> float:
        """The fraction of changed answers."""
        return self.changed / self.items


def flips(before: Sequence[Answer], after: Sequence[Answer]) -> Flips:
    """Count the answers that differ between two models, on the same items."""
    gained, lost, p = mcnemar([one.right for one in after], [one.right for one in before])
    wrong = [pair for pair in zip(before, after, strict=True) if not pair[0].right and not pair[1].right]
    return Flips(len(after), lost, gained, sum(one.choice != other.choice for one, other in wrong), p)


def of_items(before: Sequence[Json], after: Sequence[Json], metric: str) -> Flips | None:
    """Count the answers to a task's items that differ between two models; `metric` is acc or acc_norm.

    None without common items. The caller checks that the two protocols may be compared.
    """
    own, other = _choices(after, metric), _choices(before, metric)
    shared = [item for item in own if item in other]
    return flips([other[item] for item in shared], [own[item] for item in shared]) if shared else None


def _choices(items: Sequence[Json], metric: str) -> dict[Any, Answer]:
    """Return each item's answer by a metric that the task has."""
    key = ANSWERS[metric]
    return {item["item"]: Answer(item[key], item[metric] > 0.5) for item in items if key in item and metric in item}


def total_flips(several: Sequence[Flips]) -> Flips | None:
    """Return the flips of several tasks together; None without tasks."""
    if not several:
        return None
    items, lost, gained, swapped = (sum(column) for column in list(zip(*several, strict=True))[:4])
    return Flips(items, lost, gained, swapped, _fair_coins(lost, gained))
