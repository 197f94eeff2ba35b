"""Statistics of inputs: sums that are right, merge and pack; and allocations, whose mean is exact."""

from collections import Counter
from collections.abc import Callable, Iterable
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operations import Operations
from simulated_gpu import simulated_gpu

from wanda_dvc.catalog import ALLOCATIONS
from wanda_dvc.pruning import allocation
from wanda_dvc.pruning.allocation import Competition, allocate, count_scores, owl, round_to_total, sensitivity
from wanda_dvc.pruning.gram import Gram
from wanda_dvc.pruning.selection import count_removed
from wanda_dvc.pruning.solvers import GramFactors
from wanda_dvc.pruning.statistics import BlockStats, InputStats, add_slices


def inputs(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit_scores(statistics: Any, features: int, windows: Iterable[torch.Tensor]) -> Any:
    """The sums of a tier over windows."""
    found = statistics.empty(features)
    for window in windows:
        found.add(window)
    return found


@pytest.mark.parametrize("features", [1, 7, 128, 129, 300])
def test_the_matrix_is_that_of_all_tokens(features: int):
    windows = [inputs(50, features, seed=seed) * 10**seed for seed in range(3)]
    gram = unit_scores(Gram, features, windows)
    tokens = torch.cat(windows).double()
    torch.testing.assert_close(gram.matrix().double(), tokens.T @ tokens, rtol=1e-5, atol=0.1)  # of 5e5 on the diagonal
    assert torch.equal(gram.matrix(), gram.matrix().T)


def test_the_norm_tier_is_that_of_all_tokens():
    windows = [inputs(50, 7) * 10**exponent for exponent in (0, 2, -2)]
    stats = unit_scores(InputStats, 7, windows)
    tokens = torch.cat(windows).double()
    torch.testing.assert_close(stats.sum_squares, (tokens**2).sum(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.sum, tokens.sum(0), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(stats.norm, tokens.norm(dim=0).float())
    assert stats.count == 150


def test_the_norms_of_experts_are_added_together():
    """As one by one, also if some tokens are no expert's; the number of operations does not depend on them."""
    counts = []
    for slices in ([slice(0, 3), slice(3, 20)], [slice(1, 2), slice(2, 9), slice(9, 10), slice(12, 50)]):
        alone, together = ([InputStats.empty(7, "cpu") for _ in slices] for _ in range(2))
        for x in (inputs(50, 7), inputs(50, 7, seed=1).bfloat16()):
            for stats, tokens in zip(alone, slices, strict=True):
                stats.add(x[tokens])
            with Operations() as noted:
                add_slices(together, x, slices)
        counts.append(noted.counts)
        for one, other in zip(alone, together, strict=True):
            assert one.count == other.count
            torch.testing.assert_close(one.sum, other.sum, rtol=1e-6, atol=1e-5)
            torch.testing.assert_close(one.sum_squares, other.sum_squares, rtol=1e-6, atol=0)
    assert counts[0] == counts[1]


SUMS: dict[Any, Callable[[Any], torch.Tensor]] = {Gram: lambda x: x.upper.triu(), InputStats: lambda x: x.sum_squares}


@pytest.mark.parametrize("statistics", SUMS)
def test_many_windows_lose_nothing(statistics: Any):
    """Sums kept in float32 would stop at 2²⁴: adding 1 changes them no more."""
    many, one = statistics.empty(1), unit_scores(statistics, 1, [torch.ones(1, 1)])
    (many.upper if statistics is Gram else many.sum_squares).fill_(2.0**24)
    many.add(torch.ones(1, 1))
    many.merge(one)
    assert SUMS[statistics](many).item() == 2**24 + 2
    assert statistics is Gram or many.sum.item() == 2


@pytest.mark.parametrize("statistics", SUMS)
def test_half_precision_does_not_overflow(statistics: Any):
    found = unit_scores(statistics, 1, [torch.full((100, 1), 60000.0, dtype=torch.float16)])
    assert SUMS[statistics](found).sqrt().float().item() == 6e5


@pytest.mark.parametrize("features", [1, 2, 5, 200])
def test_the_triangle_is_all_that_is_kept(features: int):
    gram = unit_scores(Gram, features, [inputs(9, features)])
    packed = gram.triangle()
    matrix = gram.matrix()
    values = [matrix[i, j].item() for i in range(features) for j in range(i, features)]
    assert sorted(packed.flatten().tolist()) == sorted(values)
    again = Gram.from_triangle(packed)
    assert torch.equal(again.matrix(), matrix)
    assert torch.equal(again.triangle(), packed)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("features", [1, 2, 31, 32, 33, 100, 257])
def test_cosines_are_divided_by_each_norm_in_float64(features: int, device: str):
    x = inputs(9, features)
    x[:, 2:3] = 0  # a dead feature, where there are three
    gram = unit_scores(Gram, features, [x])
    norm = gram.upper.diagonal().sqrt()
    expected = (gram.upper / norm / norm[:, None]).nan_to_num().float()
    undefined = gram.upper + torch.full_like(gram.upper, torch.nan).tril(-1)
    with simulated_gpu():
        _, packed = Gram(undefined.to(device)).scaled_triangle()
        cosines = Gram.from_triangle(packed).upper.cpu()
        again = Gram.from_triangle(packed.half(), norm.float().to(device)).upper.cpu()
    assert expected.triu().abs().max() <= 1 + 1e-6
    assert torch.equal(cosines.triu().float(), expected.triu())
    scale = norm.float()
    assert torch.equal(again.triu(), (expected.half().float() * scale * scale[:, None]).triu().double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_starts_as_many_operations_for_any_width(dtype: torch.dtype):
    """16-bit inputs are multiplied as they are, by one product whose sums are in float32."""
    operations = []
    for features in (64, 256):
        x = (inputs(300, features) * (1 + torch.arange(features))).to(dtype)
        with simulated_gpu(), Operations(of_gpu=True) as noted:
            gram = Gram.empty(features, "cuda")
            gram.add(x.to("cuda"))
            products, conversions = noted.counts["mm"], noted.counts["_to_copy"]
            norm, triangle = gram.scaled_triangle()
            Gram.from_triangle(triangle.half(), norm)
        assert (products, conversions) == (1, 0)
        operations.append(noted.counts)
        exact = x.double().T @ x.double()
        scale = exact.diagonal().sqrt()
        assert ((gram.upper.cpu() - exact) / scale / scale[:, None]).abs().max() < 1e-5  # `make gpu` allows 1e-4
    assert operations[0] == operations[1]
    assert noted.counts.total() < 1000


def test_without_tokens_every_feature_counts_alike():
    assert torch.equal(GramFactors(Gram.empty(3).matrix()).gram, torch.eye(3))


SHAPES = {"up": (40, 24), "down": (24, 40)}  # as stored; the second is [in, out]
GROUPS = st.lists(st.builds(Competition, st.integers(1, 40), st.integers(4, 60)), min_size=1, max_size=3)
FLOAT = st.floats(0, 100, allow_subnormal=False)


def settled(raw: list[Fraction], sparsity: Fraction, sizes: list[int]) -> list[Fraction]:
    """The sparsities of linears of these sizes, in each of which all weights compete."""
    return round_to_total(raw, sparsity, [[Competition(1, size)] for size in sizes])


@given(st.data(), st.integers(0, 100).map(lambda percent: Fraction(percent, 100)))
def test_every_allocation_gives_up_what_is_asked_for(data, sparsity):
    sizes = data.draw(st.lists(st.integers(1, 10**6), min_size=1, max_size=12))
    values = data.draw(st.lists(FLOAT, min_size=len(sizes), max_size=len(sizes)))
    counts = [None if value < 1 else count_scores(value * torch.rand(5)) for value in values]
    fives = [5] * len(counts)
    for raw, of in (
        (owl(sparsity, sizes, values, spread=1), sizes),
        (sensitivity(sparsity, sizes, [None] * len(sizes), spread=0.5), sizes),
        (sensitivity(sparsity, fives, counts, spread=0.5), fives),
    ):
        sparsities = settled(raw, sparsity, of)
        assert all(0 <= sparsity <= 1 for sparsity in sparsities)
        removed = sum(map(count_removed, of, sparsities))
        assert abs(removed - sparsity * sum(of)) <= len(of) / 2


@given(st.lists(st.fractions(-2, 2), min_size=1, max_size=8), st.fractions(0, 1))
def test_the_order_and_the_distances_of_what_is_inside_stay(raw, sparsity):
    sparsities = settled(raw, sparsity, [1000] * len(raw))
    for (a, one), (b, other) in pairwise(sorted(zip(raw, sparsities, strict=True))):
        assert one <= other
        if one > 0 and other < 1:
            assert other - one == b - a


def test_shares_by_hand():
    half, strength = Fraction(1, 2), ALLOCATIONS["owl"].strength
    assert strength is not None
    raw = owl(half, [100, 100], [3.0, 1.0], strength)
    assert raw == [0, Fraction("0.16")]
    assert [float(x) for x in settled(raw, half, [100, 100])] == pytest.approx([0.42, 0.58])
    assert len(set(owl(half, [1, 1, 1], [2.0, 2.0, 2.0], 0.08))) == 1
    assert [float(x) for x in settled([Fraction(0), Fraction(1)], half, [300, 100])] == pytest.approx([1 / 3, 1])


@pytest.mark.parametrize("sparsity", [Fraction("0.1"), Fraction("0.5"), Fraction("0.6")])
def test_the_sensitivity_allocation_is_one_threshold_for_the_model(sparsity: Fraction):
    generator = torch.Generator().manual_seed(0)
    scores = [scale * torch.rand(size, generator=generator) for scale, size in ((1, 4000), (1.5, 1000), (0.7, 2000))]
    threshold = torch.cat(scores).quantile(float(sparsity))
    sparsities = sensitivity(sparsity, [len(x) for x in scores], list(map(count_scores, scores)), spread=1)
    for own, score in zip(sparsities, scores, strict=True):
        assert float(own) == pytest.approx((score <= threshold).float().mean().item(), abs=0.01)


def test_the_sensitivity_allocation_keeps_within_its_spread():
    scores = [torch.rand(1000) * scale for scale in (1e-6, 1, 1e6)]
    counts = [*map(count_scores, scores), None]
    sparsities = sensitivity(Fraction(1, 2), [1000] * 4, counts, spread=0.125)
    assert [float(sparsity) for sparsity in sparsities] == pytest.approx([0.625, 0.5, 0.375, 0.5], abs=0.01)
    assert sensitivity(Fraction(1, 2), [1000] * 2, counts[::2], spread=0.5)[0] <= Fraction("0.971")
    found = sensitivity(Fraction(1, 3), [1000] * 3, counts[:3], spread=0)
    assert [float(sparsity) for sparsity in found] == pytest.approx([1 / 3] * 3, abs=1e-6)


def test_the_sensitivity_allocation_has_no_unit():
    """Gradients, a loss or inputs that are 4 times as large change no share: a score's bins move all together."""
    scores = [torch.rand(1000) * scale for scale in (0.1, 1, 10)]
    found = [sensitivity(Fraction(1, 2), [1000] * 3, [count_scores(x * unit) for x in scores], 0.2) for unit in (1, 4)]
    assert found[0] == found[1]


def test_outliers_are_counted_over_the_whole_block():
    weights = {"up": torch.ones(9, 10), "gate": torch.full((1, 10), 100.0)}  # mean 10.9
    x = InputStats(torch.ones(10).double(), torch.zeros(10).double(), 5)
    for by, percentage in ((1.0, 10), (7.0, 10), (0.05, 0)):  # at 0.05: the mean is 1.4, and the largest 5
        scaled = weights | {"gate": by * weights["gate"]} if by < 1 else {k: by * w for k, w in weights.items()}
        assert allocation.outlier_rating(scaled, BlockStats({"up": x}, {"up": [*weights]}, [])) == [percentage]


def test_an_input_of_zeros_has_no_sensitivity():
    x = InputStats(torch.zeros(8).double(), torch.zeros(8).double(), 5)
    block = BlockStats({"up": x}, {"up": ["up"]}, [], {"up": torch.ones(3).double()})
    assert allocation.sensitivity_rating({"up": torch.ones(3, 8)}, block) == [None]


@pytest.mark.parametrize("name", [name for name, row in ALLOCATIONS.items() if row.strength is not None])
@pytest.mark.parametrize("group", ["row", "linear"])
def test_a_gpu_allocates_as_the_host(name: str, group: str):
    """Each weight crosses the link once; a device's sums may round otherwise."""
    weights = {f"{block}.{linear}": inputs(*SHAPES[linear], seed=block) ** 3 for block in range(3) for linear in SHAPES}
    blocks = [
        BlockStats(
            {f"{block}.{linear}": unit_scores(InputStats, 24, [inputs(9, 24, seed=block)]) for linear in SHAPES},
            {f"{block}.{linear}": [f"{block}.{linear}"] for linear in SHAPES},
            [f"{block}.down"],
            {f"{block}.{linear}": inputs(40, seed=block).double().square() for linear in SHAPES},
        )
        for block in range(3)
    ]
    reads = Counter[str]()

    def read(linear: str) -> torch.Tensor:
        reads[linear] += 1
        return weights[linear]

    choices: Any = {"allocation": ALLOCATIONS[name], "sparsity": Fraction(1, 2), "group": group}
    expected = allocate(weights.__getitem__, blocks, 3, **choices, device=torch.device("cpu"))
    with simulated_gpu(), Operations(of_gpu=True) as noted:
        assert allocate(read, blocks, 3, **choices, device=torch.device("cuda")) == expected
    assert len({str(sparsity) for sparsity in expected}) == 3
    assert reads == Counter(list(weights))
    assert noted.counts["abs"]


@given(st.lists(GROUPS, min_size=1, max_size=5), st.integers(0, 90).map(lambda percent: Fraction(percent, 100)))
def test_rounding_down_is_made_up_for(groups: list[list[Competition]], sparsity: Fraction):
    """All parts get the same constant, and what goes comes nearer to the sparsity."""
    sizes = [sum(number * size for number, size in part) for part in groups]
    raw = [Fraction(4 * block, 1000) for block in range(len(sizes))]
    sparsities = round_to_total(raw, sparsity, groups)
    constants = {after - before for before, after in zip(raw, sparsities, strict=True) if 0 < after < 1}
    assert len(constants) <= 1

    pruned = sum(n * count_removed(size, s) for s, part in zip(sparsities, groups, strict=True) for n, size in part)
    off = abs(pruned - sparsity * sum(sizes))
    assert off <= max(n for part in groups for n, _ in part) * sum(map(len, groups))


def test_rounding_down_is_made_up_for_by_hand():
    sparsity = Fraction("0.499")
    (rounded,) = round_to_total([sparsity], sparsity, [[Competition(4, 577)]])
    assert (count_removed(577, sparsity), count_removed(577, rounded)) == (287, 288)  # of 287.9
