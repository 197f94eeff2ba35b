"""Allocation: the mean is exact, shares stay in [0, 1], and each rule is the paper's."""

import weakref
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wanda_dvc.catalog import ALLOCATIONS
from wanda_dvc.pruning.allocation import count_scores, outlier_ratio, owl, sensitivity, settle, shift
from wanda_dvc.pruning.selection import removed

GROUPS = st.lists(st.tuples(st.integers(1, 40), st.integers(4, 60)), min_size=1, max_size=3)
FLOAT = st.floats(0, 100, allow_subnormal=False)


def mean(shares: list[Fraction], sizes: list[int]) -> Fraction:
    return sum((share * size for share, size in zip(shares, sizes, strict=True)), Fraction(0)) / sum(sizes)


@given(st.data(), st.integers(0, 99).map(lambda percent: Fraction(percent, 100)))
def test_every_allocation_gives_up_exactly_what_is_asked_for(data, sparsity):
    sizes = data.draw(st.lists(st.integers(1, 10**6), min_size=1, max_size=12))
    values = data.draw(st.lists(FLOAT, min_size=len(sizes), max_size=len(sizes)))
    counts = [None if value < 1 else count_scores(value * torch.rand(5)) for value in values]
    for shares in (
        owl(sparsity, sizes, values, spread=1),
        sensitivity(sparsity, sizes, [None] * len(sizes), spread=0.5),
    ):
        assert mean(shares, sizes) == sparsity
        assert all(0 <= share <= 1 for share in shares)
    shares = sensitivity(sparsity, [5] * len(counts), counts, spread=0.5)
    assert mean(shares, [5] * len(counts)) == sparsity
    assert all(0 <= share <= 1 for share in shares)


@given(st.lists(st.fractions(-2, 2), min_size=1, max_size=8), st.fractions(0, 1))
def test_a_shift_keeps_the_order_and_the_distances_of_what_is_inside(raw, sparsity):
    shares = shift(raw, sparsity, [1] * len(raw))
    for (a, one), (b, other) in pairwise(sorted(zip(raw, shares, strict=True))):
        assert one <= other
        if one > 0 and other < 1:
            assert other - one == b - a


def test_shares_by_hand():
    half, three, strength = Fraction(1, 2), [1, 1, 1], ALLOCATIONS["owl"].strength
    assert strength is not None
    assert owl(half, [1, 1], [3.0, 1.0], strength) == [Fraction("0.42"), Fraction("0.58")]
    assert owl(half, three, [2.0, 2.0, 2.0], 0.08) == [half] * 3
    assert shift([Fraction(0), Fraction(1)], half, [3, 1]) == [Fraction(1, 3), Fraction(1)]


@pytest.mark.parametrize("sparsity", [Fraction("0.1"), Fraction("0.5"), Fraction("0.6")])
def test_the_sensitivity_allocation_is_one_threshold_for_the_model(sparsity: Fraction):
    generator = torch.Generator().manual_seed(0)
    scores = [scale * torch.rand(size, generator=generator) for scale, size in ((1, 4000), (1.5, 1000), (0.7, 2000))]
    threshold = torch.cat(scores).quantile(float(sparsity))
    shares = sensitivity(sparsity, [len(x) for x in scores], list(map(count_scores, scores)), spread=1)
    for share, score in zip(shares, scores, strict=True):
        assert float(share) == pytest.approx((score <= threshold).float().mean().item(), abs=0.01)


def test_the_sensitivity_allocation_keeps_within_its_spread():
    scores = [torch.rand(1000) * scale for scale in (1e-6, 1, 1e6)]
    counts = [*map(count_scores, scores), None]
    shares = sensitivity(Fraction(1, 2), [1000] * 4, counts, spread=0.125)
    assert [float(share) for share in shares] == pytest.approx([0.625, 0.5, 0.375, 0.5], abs=0.01)
    assert sensitivity(Fraction(1, 2), [1000] * 2, counts[::2], spread=0.5)[0] <= Fraction("0.971")
    assert sensitivity(Fraction(1, 3), [1000] * 3, counts[:3], spread=0) == [Fraction(1, 3)] * 3


def test_the_sensitivity_allocation_has_no_unit():
    """Gradients, a loss or inputs that are 4 times as large change no share: a score's bins move all together."""
    scores = [torch.rand(1000) * scale for scale in (0.1, 1, 10)]
    shares = [sensitivity(Fraction(1, 2), [1000] * 3, [count_scores(x * unit) for x in scores], 0.2) for unit in (1, 4)]
    assert shares[0] == shares[1]


def test_outliers_are_counted_one_part_at_a_time():
    made: list[weakref.ref[torch.Tensor]] = []

    def scores() -> Iterator[torch.Tensor]:
        for _ in range(4):
            assert sum(one() is not None for one in made) <= 1  # the one before, until it is replaced
            score = torch.ones(2, 10)
            made.append(weakref.ref(score))
            yield score
            del score

    assert outlier_ratio(scores) == 0
    assert len(made) == 8  # twice


def test_outliers_are_counted_over_the_whole_block():
    scores = [torch.ones(2, 10), torch.full((1, 10), 100.0)]  # mean 34
    assert outlier_ratio(lambda: scores, times=2) == pytest.approx(100 / 3)
    assert outlier_ratio(lambda: scores) == 0
    assert outlier_ratio(lambda: [7 * score for score in scores], times=2) == pytest.approx(100 / 3)


@given(st.lists(GROUPS, min_size=1, max_size=5), st.integers(0, 90).map(lambda percent: Fraction(percent, 100)))
def test_rounding_down_is_made_up_for(groups: list[list[tuple[int, int]]], sparsity: Fraction):
    """All parts get the same constant, and what goes comes nearer to the sparsity."""
    sizes = [sum(number * size for number, size in part) for part in groups]
    raw = shift([Fraction(4 * block, 1000) for block in range(len(sizes))], sparsity, sizes)
    settled = settle(raw, sparsity, groups)
    constants = {after - before for before, after in zip(raw, settled, strict=True) if after < 1}
    assert len(constants) <= 1
    assert all(0 <= constant <= Fraction(1, 4) for constant in constants)

    def off(shares: list[Fraction]) -> Fraction:
        pruned = sum(n * removed(size, s) for s, part in zip(shares, groups, strict=True) for n, size in part)
        return abs(pruned - sparsity * sum(sizes))

    assert off(settled) <= off(raw)
    share = Fraction("0.499")
    assert (removed(577, share), removed(577, settle([share], share, [[(4, 577)]])[0])) == (287, 288)  # of 287.9
    assert off(settled) <= max(n for part in groups for n, _ in part) * sum(map(len, groups))
