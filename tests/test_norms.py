"""Looking at statistics: one linear, features that stand out again and again, two sets side by side."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from wanda_dvc.cli import app
from wanda_dvc.pruning.statistics import BlockStats, InputStats
from wanda_dvc.study.project import Project
from wanda_dvc.study.tensors import seal, write_stats

ATTENTION, MLP = ["q_proj", "k_proj"], ["up_proj"]


def write(folder: Path, norms: list[list[torch.Tensor]], *, tokens: int = 4, source: str = "a text") -> None:
    """Statistics of blocks with two distinct inputs each, from their norms."""
    folder.mkdir(parents=True, exist_ok=True)
    for block, both in enumerate(norms):
        readers = {
            f"layers.{block}.{names[0]}": [f"layers.{block}.{name}" for name in names] for names in (ATTENTION, MLP)
        }
        inputs = {
            name: InputStats(norm.double() ** 2, torch.zeros(len(norm), dtype=torch.float64), tokens)
            for name, norm in zip(readers, both, strict=True)
        }
        write_stats(folder, block, BlockStats(inputs, readers, []))
    made = {
        "made_by": "calibrate",
        "model": {"source": "tiny", "sha256": "0"},
        "text": {"source": source, "sha256": "0"},
        "params": {"windows": 1, "length": 4, "dtype": "float32"},
    }
    seal(folder, made)


def flat(**larger: float) -> torch.Tensor:
    """Twenty features of norm 2, but for `f3=…` and the like."""
    norm = torch.full((20,), 2.0)
    for name, value in larger.items():
        norm[int(name[1:])] = value
    return norm


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Three blocks; feature 3 of attention's input is an outlier in all, 7 in the last two, 9 in one.

    Feature 11 of the MLP's input is just below the limit in two.
    """
    (tmp_path / "params.yaml").touch()
    write(
        tmp_path / "stats/norms",
        [
            [flat(f3=50, f9=40), flat(f11=12)],
            [flat(f3=20, f7=13), flat(f3=16)],
            [flat(f3=14, f7=30), flat(f11=12)],
        ],
    )
    monkeypatch.chdir(tmp_path)
    return Project(tmp_path)


def stats(*words: str) -> str:
    done = CliRunner().invoke(app, ["stats", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output
