"""The laws of intervals and paired tests, against independent oracles."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from wanda_dvc.results import inference


def test_mcnemar_is_the_fair_coin_counted_out():
    """Every outcome of the disagreements, counted one by one."""
    for first, second in itertools.product(range(6), repeat=2):
        total = first + second
        mine = [True] * first + [False] * second + [True, False]
        theirs = [False] * first + [True] * second + [True, False]
        got = inference.mcnemar(mine, theirs)
        outcomes = [sum(coins) for coins in itertools.product((0, 1), repeat=total)]
        as_far = [heads for heads in outcomes if abs(heads - total / 2) >= abs(first - total / 2)]
        assert got == pytest.approx(len(as_far) / len(outcomes))
    many = inference.mcnemar([True] * 900 + [False] * 1000, [False] * 900 + [True] * 1000)
    assert many == pytest.approx(stats.binomtest(900, 1900).pvalue)


def test_the_interval_of_accuracy_is_where_a_score_test_does_not_reject():
    """Wilson's interval, found by looking at every p."""
    interval = inference.accuracy([True] * 13 + [False] * 35)
    grid = np.linspace(1e-4, 1 - 1e-4, 99_999)
    kept = grid[np.abs(13 / 48 - grid) <= 1.959964 * np.sqrt(grid * (1 - grid) / 48)]
    assert interval.value == pytest.approx(13 / 48)
    assert (interval.low, interval.high) == pytest.approx((kept.min(), kept.max()), abs=1e-4)
    assert inference.accuracy([True] * 5).high == pytest.approx(1)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    random = np.random.default_rng(0)
    covered = dict.fromkeys(["perplexity", "ratio", "tasks"], 0)
    for _ in range(400):
        first, noise = random.normal(2.0, 0.4, 20), random.normal(0.1, 0.05, 20)
        predictions = [63] * 20
        one = inference.perplexity(list(first), predictions)
        both = inference.ratio(list(first + noise), list(first), predictions)
        assert one
        assert both
        covered["perplexity"] += one.low <= math.exp(2.0) <= one.high
        covered["ratio"] += both.low <= math.exp(0.1) <= both.high
        tasks = [list(random.choice([-1.0, 0.0, 1.0], size, p=[0.2, 0.5, 0.3])) for size in (30, 60)]
        mean = inference.mean_of_tasks(tasks)
        assert mean
        covered["tasks"] += mean.low <= 0.1 <= mean.high
    assert all(0.91 <= count / 400 <= 0.985 for count in covered.values()), covered


def test_the_paired_test_agrees_with_permutations():
    random = np.random.default_rng(1)
    others = random.normal(3, 1, 12)
    losses = others + random.normal(0.05, 0.1, 12)
    got = inference.ratio(list(losses), list(others), [10] * 12)
    assert got
    difference = losses - others
    signs = np.array(list(itertools.product((-1, 1), repeat=12)))
    permuted = np.abs((signs * difference).mean(axis=1))
    assert got.p == pytest.approx((permuted >= abs(difference.mean()) - 1e-12).mean(), abs=0.03)
    assert got.value == pytest.approx(math.exp(difference.mean()))
    unpaired = inference.perplexity(list(losses), [10] * 12)
    assert unpaired
    assert math.log(got.high / got.low) < math.log(unpaired.high / unpaired.low) / 3  # why it is paired


def test_a_shorter_window_counts_by_its_predictions():
    losses, predictions = [1.0, 2.0, 6.0], [10, 10, 5]
    got = inference.perplexity(losses, predictions)
    assert got
    assert got.value == pytest.approx(math.exp((10 + 20 + 30) / 25))


def test_nothing_is_said_of_what_is_not_finite_or_alone():
    assert inference.perplexity([1.0, math.nan], [3, 3]) is None
    assert inference.perplexity([1.0], [3]) is None
    same = inference.mean_of_tasks([[0.0] * 9, [0.0] * 9])
    assert same
    assert same.p == 1


@pytest.mark.parametrize("tasks", [[[-1.0]], [[-1.0, -1.0]], [[1.0, 0.0, 1.0], [1.0]], [[1.0] * 3, [0.0] * 3]])
def test_what_does_not_vary_is_no_evidence(tasks: list[list[float]]):
    """A t interval of no width would say that one item is beyond noise."""
    assert inference.mean_of_tasks(tasks) is None


def test_holm_rejects_step_by_step():
    p = [0.04, 0.001, 0.5, 0.013, 0.012]
    adjusted = inference.holm(p)
    for level in (0.005, 0.05, 0.06, 0.2):
        rejected, left = set(), sorted(range(len(p)), key=p.__getitem__)
        while left and p[left[0]] <= level / len(left):
            rejected.add(left.pop(0))
        assert {i for i, value in enumerate(adjusted) if value <= level} == rejected


def test_an_interval_of_accuracies_stays_within_0_and_1():
    """Where the t interval of 39 of 40 ends at 102.6 %, it is cut off."""
    answers = [[True] * 39 + [False], [False] * 39 + [True]]
    plain = inference.mean_of_tasks([[float(x) for x in answers[0]]])
    most, least = inference.mean_accuracy(answers[:1]), inference.mean_accuracy(answers[1:])
    assert plain
    assert most
    assert least
    assert (plain.high > 1, most.high, least.low) == (True, 1, 0)
    assert inference.mean_accuracy(answers) == inference.mean_of_tasks(answers)
