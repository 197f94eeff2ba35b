"""The rows of a grid that `make test` runs."""

import itertools
from typing import Any

from _pytest.mark import ParameterSet
from cases.grids import cycled, full, pairs, thinned


def split(rows: list[ParameterSet]) -> tuple[list[Any], list[Any]]:
    """All rows, and those that are not `full`."""
    return [row.values for row in rows], [row.values for row in rows if not row.marks]


def pairs_of(rows: list[Any]) -> set[Any]:
    return {pair for row in rows for pair in itertools.combinations(enumerate(row), 2)}


def test_short_rows_have_every_pair_that_is_allowed():
    def allowed(letter: str, number: int, *, flag: bool) -> bool:
        return letter != "a" or number < 2 or flag

    axes = "abc", range(4), [True, False]
    every, short = split(pairs(*axes, allowed=lambda a, b, c: allowed(a, b, flag=c)))
    assert every == [row for row in itertools.product(*axes) if allowed(*row[:2], flag=row[2])]
    assert pairs_of(short) == pairs_of(every)
    assert 3 * 4 <= len(short) < len(every)


def test_in_turns_every_value_of_the_first_axis_has_as_many_of_the_second():
    every, short = split(cycled("abcde", range(4), each=2))
    assert len(every) == 20
    assert {letter: [b for a, b in short if a == letter] for letter in "abc"} == {"a": [0, 1], "b": [2, 3], "c": [0, 1]}
    assert {number for _, number in short} == set(range(4))


def test_of_thinned_rows_one_in_so_many_is_not_slow():
    rows = thinned([*"abcde", full("f"), ("g", 1)], 3)
    marks = {row.values[0]: [mark.name for mark in row.marks] for row in rows}
    slow = ["slow"]
    assert marks == {"a": [], "b": slow, "c": slow, "d": [], "e": slow, "f": ["full"], "g": slow}
