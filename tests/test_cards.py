"""What a card does otherwise, on the one device that is always there: it is given room, and a width to fill."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, outputs, walk
from hypothesis import given
from hypothesis import strategies as st
from test_selection import matrices

from wanda_dvc.engine import rows
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.recorder import Recorded
from wanda_dvc.engine.rows import as_rows
from wanda_dvc.engine.walk import Runner
from wanda_dvc.pruning.selection import above_by_numpy, above_by_torch

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu

CPU = torch.device("cpu")
ROW = 2 * 32 * 32 * 4  # bytes of a window before and after a block
ROOMS = {"none": 0, "too little": 2 * ROW, "all": 6 * ROW}


def windows(count: int = 6, length: int = 32) -> torch.Tensor:
    return torch.randint(3, 256, (count, length), generator=torch.Generator().manual_seed(1))


def run(folder: Path, work: Path, tokens: torch.Tensor) -> tuple[list[Recorded], list[torch.Tensor]]:
    decoder = Decoder(folder, dtype=torch.float32, device=CPU)
    recorded = [step.record(gram=True) for step in Runner(decoder, work).walk(tokens)]
    return recorded, outputs(decoder, as_rows(tokens), work)


@pytest.mark.parametrize("room", ROOMS)
def test_rows_that_stay_on_the_device_are_the_same_bytes(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: str
):
    recorded, hidden = run(tiny, tmp_path / "plain", windows())
    monkeypatch.setattr(Decoder, "room", lambda _: ROOMS[room])
    found, also = run(tiny, tmp_path / "stay", windows())
    assert all(torch.equal(one, other) for one, other in zip(also, hidden, strict=True))
    for one, other in zip(found, recorded, strict=True):
        assert one.stats.readers == other.stats.readers
        for name, x in other.stats.inputs.items():
            assert torch.equal(one.stats.inputs[name].sum_squares, x.sum_squares)
            assert torch.equal(one.grams[name].upper.triu(), other.grams[name].upper.triu())


@pytest.mark.parametrize(("seconds", "blocks_left"), [(0.0, 1), (60.0, 4)])
@pytest.mark.parametrize("room", ["too little", "all"])
def test_a_kill_loses_what_was_not_saved_and_no_byte(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: str, seconds: float, blocks_left: int
):
    _, hidden = run(tiny, tmp_path / "plain", windows())
    monkeypatch.setattr(Decoder, "room", lambda _: ROOMS[room])
    monkeypatch.setattr(rows, "SAVED_EVERY", seconds)
    steps = walk(Decoder(tiny, dtype=torch.float32, device=CPU), windows(), tmp_path / "killed")
    for step in steps:
        if step.index == 3:
            break
        step.advance()
    del steps
    recorded, found = run(tiny, tmp_path / "killed", windows())
    assert len(recorded) == (blocks_left if room == "all" else 1)
    assert all(torch.equal(one, other) for one, other in zip(found, hidden, strict=True))


@given(matrices(), st.data())
def test_a_card_and_the_host_select_alike_ties_included(score: torch.Tensor, data: st.DataObject):
    for given_score in (score.abs(), score, -score):
        k = data.draw(st.integers(1, score.shape[1]))
        for one, other in zip(above_by_numpy(given_score, k), above_by_torch(given_score, k), strict=True):
            assert torch.equal(one, other)


@pytest.mark.slow  # every check and every timing
def test_the_check_of_a_card_runs_where_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """So that it works on the day that there is one. Here both sides of a comparison are the CPU."""
    assert gpu.main(["--device", "cpu", "--tiny", "--work", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("| yes |" in line for line in lines) == 10
    assert sum(line.startswith("| `") for line in lines) == 4


def test_a_card_that_differs_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "check", lambda *_: [gpu.Check("masks", 1e-9, 0.0)])
    monkeypatch.setattr(gpu, "times", lambda *_: [])
    assert gpu.main(["--device", "cpu", "--tiny", "--work", str(tmp_path)]) == 1


def test_without_a_card_it_says_what_to_do(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "no CUDA device on this machine; --device cpu --tiny tries the harness" in capsys.readouterr().err
