"""`wanda-dvc speed`: both forms of a directory are measured, and the table has what was measured."""

import json
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import save_tiny_model
from test_packed import equal_directories, packed

from wanda_dvc.errors import UserError
from wanda_dvc.packed import speed as room
from wanda_dvc.packed.format import packing_of
from wanda_dvc.packed.speed import Speed, measure

speed = partial(room.speed, prompt=128, tokens=64, device="cpu")
SLOW, FAST = Speed(2.0, 3_000_000_000, 0.5, 10.0), Speed(1.0, 1_500_000_000, 0.6, 15.0)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """The directories that were measured, by a stand-in: a packed one is the faster."""
    folders: list[Path] = []

    def stand_in(folder: Path, *, prompt: int, tokens: int, device: str) -> Speed:
        assert (prompt, tokens, device) == (128, 64, "cpu")
        assert (folder / "config.json").is_file()
        folders.append(folder)
        return FAST if packing_of(folder) else SLOW

    monkeypatch.setattr(room, "measure", stand_in)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    return folders


def cells(table: str, label: str) -> list[str]:
    (row,) = [line for line in table.splitlines() if line.startswith(f"| {label}")]
    return [cell.strip() for cell in row.split("|")[2:-1]]


@pytest.mark.parametrize("given", ["dense", "packed"])
def test_the_other_form_is_made_for_it_and_gone_afterwards(given: str, seen: list[Path], tmp_path: Path):
    folders = dict(zip(("dense", "packed"), packed(tmp_path), strict=True))
    table = speed(folders=[folders[given]])
    assert cells(table, "load, s") == ["2.00", "1.00", "0.50 ×"]
    assert cells(table, "resident memory, GB") == ["3.00", "1.50", "0.50 ×"]
    assert cells(table, "time to first token, s") == ["0.50", "0.60", "1.20 ×"]
    assert cells(table, "tokens a second") == ["10.0", "15.0", "1.50 ×"]
    assert f"{folders[given]} is {given}" in table
    assert [folder == folders[form] for form, folder in zip(folders, seen, strict=True)].count(True) == 1
    assert not list((tmp_path / "scratch").iterdir())
    content = json.loads(speed(folders=[folders[given]], as_json=True))
    found = content["measured"]
    assert found["packed"] == {"stored_bytes": found["packed"]["stored_bytes"], **vars(FAST)}
    assert found["dense"]["stored_bytes"] > found["packed"]["stored_bytes"]


def test_what_stands_in_for_the_dense_directory_is_the_dense_directory(
    seen: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source, target = packed(tmp_path)
    equal: list[bool] = []

    def stand_in(folder: Path, **_: object) -> Speed:
        equal.append(folder == target or equal_directories(source, folder))
        return SLOW

    monkeypatch.setattr(room, "measure", stand_in)
    speed(folders=[target])
    assert equal == [True, True]


def test_two_directories_are_compared_as_they_are(seen: list[Path], tmp_path: Path):
    dense, target = packed(tmp_path)
    for first, second, ratio in ((dense, target, "1.50 ×"), (target, dense, "0.67 ×")):
        seen.clear()
        table = speed(folders=[first, second])
        assert seen == [first, second]
        assert [cell.strip() for cell in table.splitlines()[2].split("|")[2:-1]] == [str(first), str(second), "ratio"]
        assert cells(table, "tokens a second")[-1] == ratio
        content = json.loads(speed(folders=[first, second], as_json=True))
        assert [*content["measured"]] == content["directories"] == [str(first), str(second)]
    with pytest.raises(UserError, match="scratch: no config.json"):
        speed(folders=[dense, tmp_path / "scratch"])


def test_a_directory_without_zeros_is_measured_alone(seen: list[Path], tmp_path: Path):
    table = speed(folders=[save_tiny_model(tmp_path / "source", max_position_embeddings=192)])
    assert cells(table, "tokens a second") == ["10.0"]
    assert "too few zeros to be smaller without them: nothing to pack" in table
    assert len(seen) == 1


@pytest.mark.slow  # begins a process that loads a model
def test_a_model_is_measured_in_a_process_of_its_own(tmp_path: Path):
    _, target = packed(tmp_path)
    found = measure(target, prompt=3, tokens=4, device="cpu")
    assert 50_000_000 < found.memory_bytes < 2_000_000_000
    assert 0 < found.first_token_seconds < 60
    assert 0 < found.load_seconds < 60
    assert 0.02 < found.tokens_per_second < 1e5


def test_what_cannot_be_measured_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="no config.json, expected a model's directory"):
        speed(folders=[tmp_path])
    with pytest.raises(UserError, match="--device: got cpux, expected cpu or cuda"):
        speed(folders=[tmp_path], device="cpux")
    (tmp_path / "config.json").write_text('{"model_type": "foo"}')
    with pytest.raises(UserError, match="config.json: .*expected a configuration that transformers accepts"):
        speed(folders=[tmp_path])
    source = save_tiny_model(tmp_path / "source", max_position_embeddings=100)
    with pytest.raises(UserError, match=r"got 128 \+ 64, expected at most 100 for this model"):
        speed(folders=[source])
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device: got cuda"):
            speed(folders=[source], device="cuda")
