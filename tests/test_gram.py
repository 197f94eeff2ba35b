"""Statistics of inputs: sums that are right, merge and pack; and the layer error against the outputs themselves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Patch

from wanda_dvc.pruning.choose import prepare, prune_linear
from wanda_dvc.pruning.gram import Gram, layer_errors
from wanda_dvc.pruning.statistics import InputStats


def inputs(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("features", [1, 7, 128, 129, 300])
def test_the_matrix_is_that_of_all_tokens(features: int):
    windows = [inputs(50, features, seed=seed) * 10**seed for seed in range(3)]
    gram = Gram.empty(features)
    for window in windows:
        gram.add(window)
    tokens = torch.cat(windows).double()
    torch.testing.assert_close(gram.matrix().double(), tokens.T @ tokens, rtol=1e-5, atol=0.1)  # of 5e5 on the diagonal
    assert torch.equal(gram.matrix(), gram.matrix().T)
    assert gram.count == 150


def test_the_norm_tier_is_that_of_all_tokens():
    windows = [inputs(50, 7) * 10**exponent for exponent in (0, 2, -2)]
    stats = InputStats.empty(7)
    for window in windows:
        stats.add(window)
    tokens = torch.cat(windows).double()
    torch.testing.assert_close(stats.sum_squares, (tokens**2).sum(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.sum, tokens.sum(0), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(stats.norm, tokens.norm(dim=0).float())
    assert stats.count == 150


SUMS: dict[Any, Callable[[Any], torch.Tensor]] = {Gram: lambda x: x.upper.triu(), InputStats: lambda x: x.sum_squares}


@pytest.mark.parametrize("tier", SUMS)
def test_many_windows_lose_nothing(tier: Any):
    """Sums kept in float32 would stop at 2²⁴: adding 1 changes them no more."""
    many, one = tier.empty(1), tier.empty(1)
    (many.upper if tier is Gram else many.sum_squares).fill_(2.0**24)
    many.add(torch.ones(1, 1))
    one.add(torch.ones(1, 1))
    many.merge(one)
    assert SUMS[tier](many).item() == 2**24 + 2


@pytest.mark.parametrize("tier", SUMS)
def test_half_precision_does_not_overflow(tier: Any):
    found = tier.empty(1)
    found.add(torch.full((100, 1), 60000.0, dtype=torch.float16))
    assert SUMS[tier](found).sqrt().float().item() == 6e5


@pytest.mark.parametrize("tier", SUMS)
def test_sums_of_shards_merge_to_those_of_all_tokens(tier: Any):
    windows = list(inputs(4, 50, 140))
    direct, merged = tier.empty(140), tier.empty(140)
    for window in windows:
        direct.add(window)
    for shard in (windows[:1], windows[1:], []):
        part = tier.empty(140)
        for window in shard:
            part.add(window)
        merged.merge(part)
    assert merged.count == direct.count == 200
    torch.testing.assert_close(SUMS[tier](merged), SUMS[tier](direct), rtol=1e-14, atol=1e-12)


@pytest.mark.parametrize("features", [1, 2, 5, 200])
def test_the_triangle_is_all_that_is_kept(features: int):
    gram = Gram.empty(features)
    gram.add(inputs(9, features))
    packed = gram.triangle()
    assert packed.shape == (features * (features + 1) // 2,)
    matrix = gram.matrix()
    assert packed.tolist() == [matrix[i, j].item() for i in range(features) for j in range(i, features)]
    again = Gram.from_triangle(packed, gram.count)
    assert torch.equal(again.matrix(), matrix)
    assert torch.equal(again.triangle(), packed)
    assert again.count == 9


def test_without_tokens_every_feature_counts_alike():
    assert torch.equal(Gram.empty(3).matrix(), torch.eye(3))


def test_the_layer_error_is_that_of_the_outputs():
    x, weight = inputs(60, 20).double(), inputs(7, 20, seed=1)
    pruned = weight * (inputs(7, 20, seed=2) > 0)
    gram = Gram.empty(20)
    gram.add(x.float())
    expected = ((weight - pruned).double() @ x.T).norm() ** 2 / (weight.double() @ x.T).norm() ** 2
    others = [pruned, weight, torch.zeros_like(weight)]
    assert layer_errors(weight, others, gram.matrix()) == [pytest.approx(expected.item(), rel=1e-6), 0, 1]
    assert layer_errors(torch.zeros(7, 20), [torch.zeros(7, 20)], gram.matrix()) == [0]


def test_the_layer_error_counts_nothing_of_features_that_no_token_excites():
    x, weight = inputs(60, 20), inputs(7, 20, seed=1)
    x[:, 3:9] = 0
    gram = Gram.empty(20)
    gram.add(x)
    keep = torch.ones(7, 20, dtype=torch.bool)
    keep[:, 3:9] = False
    _, error, plain = prune_linear(weight, keep, prepare(gram, "x"))
    assert (error, plain) == (0, 0)
    keep[:, 0] = False
    expected = ((weight[:, :1] @ x.T[:1]).norm() / (weight @ x.T).norm()) ** 2
    assert prune_linear(weight, keep, prepare(gram, "x")).error == pytest.approx(expected.item(), rel=1e-5)


def test_the_layer_error_by_slices_is_that_of_the_whole(monkeypatch: Patch):
    weight, gram = inputs(13, 20), Gram.empty(20)
    gram.add(inputs(60, 20, seed=1))
    direct = layer_errors(weight, [weight.round()], gram.matrix())
    monkeypatch.setattr("wanda_dvc.pruning.gram.WEIGHTS_AT_A_TIME", 50)
    assert layer_errors(weight, [weight.round()], gram.matrix()) == pytest.approx(direct, rel=1e-12)


def test_the_layer_error_loses_no_digits_where_the_input_hardly_goes():
    """A change along a direction of almost no energy: float32 products would leave noise, even below zero."""
    gram = torch.full((2, 2), 1e6)
    gram[1, 1] += 1
    weight = torch.tensor([[1.0, 1.0]])
    pruned = weight - torch.tensor([[1000.0, -1000.0]])
    assert layer_errors(weight, [pruned], gram) == [pytest.approx(1e6 / 4000001, rel=1e-9)]
