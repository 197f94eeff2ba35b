"""Statistics of inputs: sums that are right, stay right over many windows, and merge."""

import torch

from wanda_dvc.pruning.statistics import InputStats


def test_sums_equal_those_in_float64():
    windows = [torch.randn(50, 7) * 10**exponent for exponent in (0, 2, -2)]
    stats = InputStats.empty(7)
    for window in windows:
        stats.add(window)
    tokens = torch.cat(windows).double()
    torch.testing.assert_close(stats.sum_squares, (tokens**2).sum(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.sum, tokens.sum(0), rtol=1e-5, atol=1e-4)
    assert stats.count == 150
    torch.testing.assert_close(stats.norm, tokens.norm(dim=0).float())


def test_many_windows_lose_nothing():
    """Sums kept in float32 would stop at 2²⁴: adding 1 changes them no more."""
    stats = InputStats(torch.full((1,), 2.0**24, dtype=torch.float64), torch.zeros(1, dtype=torch.float64), 1)
    stats.add(torch.ones(1, 1))
    assert stats.sum_squares.item() == 2**24 + 1


def test_half_precision_does_not_overflow():
    stats = InputStats.empty(1)
    stats.add(torch.full((100, 1), 60000.0, dtype=torch.float16))
    assert stats.norm.item() == torch.tensor(60000.0, dtype=torch.float16).item() * 10


def test_sums_of_shards_merge_to_those_of_all_tokens():
    windows = list(torch.randn(4, 50, 7, generator=torch.Generator().manual_seed(0)))
    direct, merged = InputStats.empty(7), InputStats.empty(7)
    for window in windows:
        direct.add(window)
    for shard in (windows[:1], windows[1:]):
        stats = InputStats.empty(7)
        for window in shard:
            stats.add(window)
        merged.merge(stats)
    assert merged.count == direct.count
    torch.testing.assert_close(merged.sum_squares, direct.sum_squares, rtol=1e-14, atol=0)
    torch.testing.assert_close(merged.sum, direct.sum, rtol=0, atol=1e-12)
    merged.merge(InputStats.empty(7))
    assert merged.count == direct.count
