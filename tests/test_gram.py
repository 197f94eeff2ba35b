"""Gram matrices: sums that are right, merge and pack; and the layer error against the outputs themselves."""

import pytest
import torch

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


def test_its_diagonal_is_the_norm_tier():
    gram, stats = Gram.empty(130), InputStats.empty(130)
    for window in inputs(3, 40, 130):
        gram.add(window)
        stats.add(window)
    torch.testing.assert_close(gram.upper.diagonal().sqrt().float(), stats.norm, rtol=1e-6, atol=0)


def test_many_windows_lose_nothing():
    """Sums kept in float32 would stop at 2²⁴: adding 1 changes them no more."""
    gram = Gram(torch.full((1, 1), 2.0**24, dtype=torch.float64), 1)
    gram.add(torch.ones(1, 1))
    other = Gram.empty(1)
    other.add(torch.ones(1, 1))
    gram.merge(other)
    assert gram.upper.item() == 2**24 + 2


def test_half_precision_does_not_overflow():
    gram = Gram.empty(2)
    gram.add(torch.full((100, 2), 60000.0, dtype=torch.float16))
    torch.testing.assert_close(gram.upper.triu(), torch.full((2, 2), 3.6e11, dtype=torch.float64).triu())


def test_sums_of_shards_merge_to_those_of_all_tokens():
    windows = list(inputs(4, 50, 140))
    direct, merged = Gram.empty(140), Gram.empty(140)
    for window in windows:
        direct.add(window)
    for shard in (windows[:1], windows[1:]):
        gram = Gram.empty(140)
        for window in shard:
            gram.add(window)
        merged.merge(gram)
    assert merged.count == direct.count
    torch.testing.assert_close(merged.upper.triu(), direct.upper.triu(), rtol=1e-14, atol=1e-12)


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


def test_the_layer_error_by_slices_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch):
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
