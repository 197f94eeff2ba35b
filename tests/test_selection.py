"""From score to mask: against loops, and the laws that no implementation may break."""

from fractions import Fraction

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from wanda_dvc.errors import UserError
from wanda_dvc.pruning import scores
from wanda_dvc.pruning.methods import METHODS
from wanda_dvc.pruning.selection import keep_by_share, keep_n_of_m, removed, select
from wanda_dvc.pruning.statistics import InputStats

# Few distinct values, so that ties, zeros and constant rows are the rule; and a huge one.
VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 0.5, -3.0, 1e30])
SPARSITY = st.integers(0, 99).map(lambda percent: percent / 100)


@st.composite
def matrices(draw, columns=None):
    shape = draw(st.integers(1, 5)), draw(st.integers(1, 12) if columns is None else columns)
    return torch.from_numpy(draw(arrays.arrays("float32", shape, elements=VALUES)))


def test_worked_example_of_the_paper():
    """Figure 1 of arXiv 2306.11695: magnitude and Wanda choose differently."""
    weight = torch.tensor([[4.0, 0.0, 1.0, -1.0], [3.0, -2.0, -1.0, -3.0], [-3.0, 1.0, 0.0, 2.0]])
    norm = torch.tensor([1.0, 2.0, 8.0, 3.0])
    score = scores.wanda(weight, norm)
    assert score.tolist() == [[4, 0, 8, 3], [3, 4, 8, 9], [3, 2, 0, 6]]
    kept = select(score, sparsity=0.5)
    assert (weight * kept).tolist() == [[4, 0, 1, 0], [0, 0, -1, -3], [-3, 0, 0, 2]]


@given(matrices(), SPARSITY)
def test_rows_and_layer_equal_the_loops(weight, sparsity):
    score = oracle.scores(weight.tolist())
    rows, columns = weight.shape
    by_row = select(scores.magnitude(weight), sparsity=sparsity, group="row")
    assert by_row.tolist() == oracle.keep_by_row(score, int(columns * Fraction(str(sparsity))))
    by_layer = select(scores.magnitude(weight), sparsity=sparsity, group="layer")
    assert by_layer.tolist() == oracle.keep_by_layer(score, int(rows * columns * Fraction(str(sparsity))))


@given(st.sampled_from([(1, 2), (2, 4), (1, 4), (4, 8), (3, 8)]), st.data())
def test_n_of_m_equals_the_loops(n_of_m, data):
    n, m = n_of_m
    weight = data.draw(matrices(st.integers(1, 3).map(lambda groups: groups * m)))
    keep = select(scores.magnitude(weight), sparsity=1 - n / m, pattern=f"{n}:{m}")
    assert keep.tolist() == oracle.keep_n_of_m(oracle.scores(weight.tolist()), n, m)
    assert (keep.unflatten(1, (-1, m)).sum(-1) == n).all()


@given(matrices(), SPARSITY)
def test_the_variant_equals_the_loops(weight, sparsity):
    score = oracle.scores(weight.tolist())
    try:
        keep = keep_by_share(scores.magnitude(weight), sparsity)
    except UserError:  # at the largest share too little goes
        return
    assert keep.tolist() == oracle.keep_by_share(score, sparsity)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.7])
def test_the_variants_rows_give_up_the_same_share(sparsity: float):
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(64, 512, generator=generator) ** torch.linspace(0.5, 8, 64)[:, None]
    keep = keep_by_share(score, sparsity)
    assert (~keep).float().mean().item() == pytest.approx(sparsity, abs=0.001)
    shares = (score * ~keep).sum(1) / score.sum(1)
    assert (shares.max() - shares.min()).item() < 0.01
    assert (~keep).sum(1)[0] < (~keep).sum(1)[-1]  # where few scores are large, more go
    assert torch.equal(keep_by_share(score * torch.rand(64, 1, generator=generator).add(0.5), sparsity), keep)


def test_the_variant_says_what_it_cannot_reach():
    with pytest.raises(UserError, match=r"sparsity: got 0.95 with method wanda-variant, expected at most 0.800"):
        keep_by_share(torch.ones(2, 100), 0.95)


@given(st.data())
def test_wanda_equals_the_loops(data):
    weight = data.draw(matrices(st.integers(1, 8)))
    tokens = arrays.arrays(
        "float32", (data.draw(st.integers(1, 6)), weight.shape[1]), elements=st.sampled_from([0.0, 1.0, -2.0, 3.0])
    )
    inputs = torch.from_numpy(data.draw(tokens))
    stats = InputStats.empty(weight.shape[1])
    stats.add(inputs)
    score = METHODS["wanda"].score(weight, stats)
    expected = torch.tensor(oracle.scores(weight.tolist(), inputs.tolist()), dtype=torch.float64)
    torch.testing.assert_close(score.double(), expected, rtol=1e-6, atol=0)


@given(matrices(), SPARSITY)
def test_equal_norms_make_wanda_magnitude(weight, sparsity):
    ones = torch.ones(weight.shape[1])
    assert torch.equal(
        select(scores.wanda(weight, ones), sparsity=sparsity), select(scores.magnitude(weight), sparsity=sparsity)
    )


@given(matrices(), SPARSITY, st.integers(-8, 8))
def test_scaling_every_norm_changes_nothing(weight, sparsity, exponent):
    norm = torch.arange(1.0, weight.shape[1] + 1)
    one, other = (select(scores.wanda(weight, n), sparsity=sparsity) for n in (norm, norm * 2.0**exponent))
    assert torch.equal(one, other)


@given(matrices(), SPARSITY)
def test_what_is_kept_grows_as_sparsity_falls(weight, sparsity):
    more, less = (select(scores.magnitude(weight), sparsity=s) for s in (sparsity, sparsity / 2))
    assert (less | ~more).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", ["row", "layer"])
def test_counts_are_exact_where_almost_every_score_is_tied(dtype, group):
    weight = torch.randn(64, 200, generator=torch.Generator().manual_seed(0)).mul(4).round().to(dtype)
    keep = select(scores.magnitude(weight), sparsity=0.37, group=group)
    if group == "row":
        assert (keep.sum(1) == 200 - 74).all()
    assert keep.sum() == 64 * (200 - 74)


def test_dead_features_go_first():
    weight, norm = torch.randn(8, 20), torch.ones(20)
    norm[[3, 7, 11]] = 0
    assert not select(scores.wanda(weight, norm), sparsity=0.15)[:, [3, 7, 11]].any()


@pytest.mark.parametrize(
    ("size", "sparsity", "expected"), [(100, 0.29, 29), (1536, 0.3, 460), (576, 0.5, 288), (10, 0.0, 0), (3, 0.999, 2)]
)
def test_the_number_removed_is_that_of_the_decimal(size, sparsity, expected):
    assert removed(size, sparsity) == expected


def test_ties_go_first_come_first():
    assert select(torch.ones(1, 5), sparsity=0.4).tolist() == [[False, False, True, True, True]]
    assert keep_n_of_m(torch.ones(1, 4), 2, 4).tolist() == [[False, False, True, True]]


@given(matrices(), SPARSITY)
def test_other_devices_would_choose_the_same(weight, sparsity):
    """Where numpy is no choice, kthvalue finds the threshold: the same one."""
    score = scores.magnitude(weight)
    go = removed(weight.shape[1], sparsity)
    if go:
        by_kth = torch.kthvalue(score, go, dim=1, keepdim=True).values
        assert torch.equal(by_kth, score.sort(dim=1).values[:, go - 1 : go])
