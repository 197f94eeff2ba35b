"""Grids of choices: the rows that every run of the tests takes, and those that `make test-all` adds."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from _pytest.mark import ParameterSet

from wanda_dvc.catalog import methods

# Without the methods that score complete blocks or experts: those take their own pattern alone.
OF_WEIGHTS = {name: method for name, method in methods().items() if method.competition not in ("blocks", "experts")}


def pairs(*axes: Iterable[Any], allowed: Callable[..., bool] = lambda *row: True) -> list[ParameterSet]:
    """Every allowed row of a product of axes. The rows that are not needed to cover all pairs of values are `full`.

    Two values of two axes that occur together in an allowed row occur together in a row that is not `full`. The choice
    is greedy and deterministic: each row is the first of those that cover the most pairs that no row before covers.
    """
    values = [list(axis) for axis in axes]
    places = [row for row in itertools.product(*(range(len(axis)) for axis in values)) if allowed(*_row(values, row))]
    pairs_of = {row: set(itertools.combinations(enumerate(row), 2)) for row in places}
    missing, chosen = set[Any]().union(*pairs_of.values()), set()
    while missing:
        best = max(places, key=lambda row: len(pairs_of[row] & missing))
        missing -= pairs_of[best]
        chosen.add(best)
    return [_parameters(_row(values, row), short=row in chosen) for row in places]


def cycled(first: Iterable[Any], second: Sequence[Any], *, each: int = 1) -> list[ParameterSet]:
    """Every row of a product of two axes. Rows beyond `each` for a value of the first, in turn, are `full`."""
    return [
        _parameters((value, other), short=(place - index * each) % len(second) < each)
        for index, value in enumerate(first)
        for place, other in enumerate(second)
    ]


def full(*row: Any) -> ParameterSet:
    """A row that `make test-all` adds."""
    return _parameters(row, short=False)


def thinned(rows: Iterable[Any], each: int) -> list[ParameterSet]:
    """Every row. Of those that are not `full`, one in `each` stays as it is, and the others are `slow`."""
    made, place = list[ParameterSet](), 0
    for row in rows:
        given = row if isinstance(row, ParameterSet) else pytest.param(*(row if isinstance(row, tuple) else [row]))
        if not given.marks:
            if place % each:
                given = pytest.param(*given.values, marks=pytest.mark.slow)
            place += 1
        made.append(given)
    return made


def named(value: object) -> str | None:
    """The name of a value: of a mapping its values, of another value what pytest gives it."""
    return "-".join(map(str, value.values())) or "default" if isinstance(value, dict) else None


def _row(values: list[list[Any]], places: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple(axis[place] for axis, place in zip(values, places, strict=True))


def _parameters(row: tuple[Any, ...], *, short: bool) -> ParameterSet:
    return pytest.param(*row, marks=() if short else pytest.mark.full)
