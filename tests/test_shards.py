"""Shards follow from the number of rows, and what they give merges to the same bytes."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import walk
from hypothesis import given
from hypothesis import strategies as st

from wanda_dvc.engine import rows
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.recorder import Sums
from wanda_dvc.errors import UserError

CPU = torch.device("cpu")


@given(st.integers(0, 20_000))
def test_shards_hold_every_row_once_and_in_order(number: int):
    cut = rows.shards(number)
    assert [row for shard in cut for row in shard] == list(range(number))
    assert len(cut) >= min(number, rows.FEWEST)
    assert all(1 <= len(shard) <= rows.LONGEST for shard in cut)
    assert len({len(shard) for shard in cut[:-1]}) <= 1
    assert all(len(after) <= len(before) for before, after in pairwise(cut))


@pytest.mark.parametrize(
    ("count", "number", "size"), [(0, 0, 0), (3, 3, 1), (16, 16, 1), (128, 16, 8), (10_000, 100, 100)]
)
def test_shards_as_the_documentation_says(count: int, number: int, size: int):
    cut = rows.shards(count)
    assert (len(cut), len(cut[0]) if cut else 0) == (number, size)


def test_the_sums_of_all_shards_are_those_of_all_rows(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tokens, found = torch.randint(0, 256, (37, 12), generator=torch.Generator().manual_seed(0)), []
    for fewest in (16, 1):  # shards of two rows, and one of all
        monkeypatch.setattr(rows, "FEWEST", fewest)
        decoder = Decoder(tiny, dtype=torch.float32, device=CPU)
        step = next(iter(walk(decoder, tokens, tmp_path / str(fewest), with_dense=True)))
        found.append(step.record(gram=True, crosses=True))
    one, other = found
    assert one.stats.readers == other.stats.readers
    for name, x in other.stats.inputs.items():
        assert one.stats.inputs[name].count == x.count == 37 * 12
        torch.testing.assert_close(one.stats.inputs[name].sum_squares, x.sum_squares)
        torch.testing.assert_close(one.grams[name].upper.triu(), other.grams[name].upper.triu())
        torch.testing.assert_close(one.crosses[name], other.crosses[name])


def test_a_linear_reads_one_input_in_all_shards():
    total = Sums(source={"up": "gate"})
    with pytest.raises(UserError, match="^up: it reads the input of gate, and in other windows of up; unsupported"):
        total.merge(Sums(source={"up": "up"}))
