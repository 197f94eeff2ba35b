"""Grids of choices, of which pairs of values are enough."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from wanda_dvc.catalog import methods

# Without the methods that score complete blocks or experts: those take their own pattern alone.
OF_WEIGHTS = {name: method for name, method in methods().items() if not method.patterns}


def pairs(*axes: Iterable[Any], allowed: Callable[..., bool] = lambda *row: True) -> list[tuple[Any, ...]]:
    """Rows of a product of axes in which every two values occur together that do so in an allowed row.

    The choice is greedy and deterministic: each row is the first of those that cover the most pairs that no row before
    covers.
    """
    values = [list(axis) for axis in axes]

    def row(places: tuple[int, ...]) -> tuple[Any, ...]:
        return tuple(axis[place] for axis, place in zip(values, places, strict=True))

    rows = {
        places: set(itertools.combinations(enumerate(places), 2))
        for places in itertools.product(*(range(len(axis)) for axis in values))
        if allowed(*row(places))
    }
    missing, chosen = set[Any]().union(*rows.values()), list[tuple[Any, ...]]()
    while missing:
        best = max(rows, key=lambda places: len(rows[places] & missing))
        missing -= rows[best]
        chosen.append(row(best))
    return chosen


def short(rows: Iterable[Any], *chosen: Any) -> list[Any]:
    """The rows of a grid, of which `make test` runs the chosen ones; without this, the first."""
    each = [row if isinstance(row, tuple) else (row,) for row in chosen]
    marked = [pytest.param(*values, marks=pytest.mark.short) for values in each]
    return [*marked, *(row for row in rows if row not in chosen)]


def named(value: object) -> str | None:
    """The name of a value: of a mapping its values, of another value what pytest gives it."""
    return "-".join(map(str, value.values())) or "default" if isinstance(value, dict) else None
