"""Shards follow from the number of rows, and what they give merges to the same bytes."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wanda_dvc.engine import shards
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.recorder import CrossRecorder, Sums
from wanda_dvc.engine.walk import walk
from wanda_dvc.errors import UserError

CPU = torch.device("cpu")


@given(st.integers(0, 20_000))
def test_shards_hold_every_row_once_and_in_order(rows: int):
    cut = shards.cut(rows)
    assert [row for shard in cut for row in shard] == list(range(rows))
    assert len(cut) >= min(rows, shards.FEWEST)
    assert all(1 <= len(shard) <= shards.LONGEST for shard in cut)
    assert len({len(shard) for shard in cut[:-1]}) <= 1
    assert all(len(after) <= len(before) for before, after in pairwise(cut))


@pytest.mark.parametrize(
    ("rows", "number", "size"), [(0, 0, 0), (3, 3, 1), (16, 16, 1), (128, 16, 8), (10_000, 100, 100)]
)
def test_shards_as_the_documentation_says(rows: int, number: int, size: int):
    cut = shards.cut(rows)
    assert (len(cut), len(cut[0]) if cut else 0) == (number, size)


@pytest.mark.parametrize("crosses", [False, True])
def test_a_walk_gives_the_sums_of_its_shards_alone(tiny: Path, tmp_path: Path, crosses: bool):
    """Each shard in a walk of its own, and then merged: byte for byte what one walk of all rows gives."""
    rows = torch.randint(0, 256, (37, 12), generator=torch.Generator().manual_seed(0))
    decoder = Decoder(tiny, dtype=torch.float32, device=CPU)
    complete = [
        step.record(gram=True, crosses=crosses) for step in walk(decoder, rows, tmp_path / "whole", with_dense=crosses)
    ]
    cut = shards.cut(len(rows))
    assert len(cut) > 1
    separate = [
        [
            step.record_shard(range(len(shard)), gram=True, crosses=crosses)
            for step in walk(decoder, rows[list(shard)], tmp_path / str(number), with_dense=crosses)
            if not step.dense or step.advance(rows=step.dense) is None
        ]
        for number, shard in enumerate(cut)
    ]
    for block, expected in enumerate(complete):
        total = Sums()
        for steps in separate:
            total.merge(steps[block].cpu())
        found = total.of(decoder.linears(block))
        assert found.stats.readers == expected.stats.readers
        for name, x in expected.stats.inputs.items():
            assert torch.equal(found.stats.inputs[name].sum_squares, x.sum_squares)
            assert torch.equal(found.stats.inputs[name].sum, x.sum)
            assert found.stats.inputs[name].count == x.count
            assert torch.equal(found.grams[name].upper.triu(), expected.grams[name].upper.triu())
            if crosses:
                assert torch.equal(found.crosses[name], expected.crosses[name])


def test_the_sums_of_all_shards_are_those_of_all_rows(tiny: Path, tmp_path: Path):
    rows = torch.randint(0, 256, (37, 12), generator=torch.Generator().manual_seed(0))
    decoder, recorder = Decoder(tiny, dtype=torch.float32, device=CPU), CrossRecorder(gram=True)
    steps = walk(decoder, rows, tmp_path, with_dense=True)
    step = next(steps)  # whose block stays as long as `steps`
    found = step.record(gram=True, crosses=True)
    step.advance(recorder, rows=step.own, dense=step.dense)
    assert found.stats.readers == recorder.of(recorder.linears).stats.readers
    for name, x in recorder.stats.items():
        assert found.stats.inputs[name].count == x.count == 37 * 12
        torch.testing.assert_close(found.stats.inputs[name].sum_squares, x.sum_squares)
        torch.testing.assert_close(found.grams[name].upper.triu(), recorder.grams[name].upper.triu())
        torch.testing.assert_close(found.crosses[name], recorder.crosses[name])


def test_a_linear_reads_one_input_in_all_shards():
    total = Sums(source={"up": "gate"})
    with pytest.raises(UserError, match="^up: reads gate in one window and up in another$"):
        total.merge(Sums(source={"up": "up"}))
