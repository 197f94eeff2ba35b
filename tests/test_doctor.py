"""The doctor finds what is missing, says what to do, and exits as it found."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, Patch, write_params, write_settings
from dvc.repo import Repo

from wanda_dvc.stages.needs import NEEDS, need
from wanda_dvc.study.project import Project
from wanda_dvc.views.doctor import doctor


@pytest.fixture
def study(tmp_path: Path) -> Path:
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    Repo.init(str(tmp_path)).close()
    shutil.copyfile(ROOT / ".dvc/config", tmp_path / ".dvc/config")
    shutil.copyfile(ROOT / "dvc.yaml", tmp_path / "dvc.yaml")
    write_params(tmp_path, tmp_path)
    return tmp_path


def row(table: str, what: str) -> str:
    return next(line for line in table.splitlines() if re.match(rf"\| {re.escape(what)} +\|", line))


def test_a_whole_study_is_well(study: Path):
    before = sorted(study.iterdir())
    table, well = doctor(start=study)
    assert well, table
    for what in ("wanda-dvc", "libraries", "params.yaml", "cpu", "disk"):
        assert "✓" in row(table, what)
    assert "Nothing that is needed is missing." in table
    assert sorted(study.iterdir()) == before


def test_a_device_of_workers_is_not_asked_of_this_machine(study: Path, monkeypatch: Patch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    write_params(study, study, runtime__device="cuda")
    assert "✗" in row(doctor(start=study)[0], "runtime.device")
    write_params(study, study, runtime__device="cuda", runtime__ray="head.invalid:6379")
    assert "runtime.device" not in doctor(start=study)[0]


@pytest.mark.parametrize(
    ("what", "harm", "todo"),
    [
        ("params.yaml", lambda study: write_settings(study, study, sparsity=2.0), "found 2.0, expected less than 1"),
        ("params.yaml", lambda study: (study / "params.yaml").unlink(), "cd into a study"),
        ("runtime.device", lambda study: write_params(study, study, runtime__device="cuda:99"), "expected one it has"),
    ],
)
def test_what_is_missing_is_named_with_what_to_do(study: Path, what: str, harm, todo: str):
    harm(study)
    table, well = doctor(start=study)
    assert not well
    assert "✗" in row(table, what)
    assert todo in row(table, what)
    assert re.search(rf"Missing: .*{re.escape(what)}", table)


@pytest.mark.parametrize(("free", "well"), [(10**6, False), (10**12, True)])
def test_it_says_what_each_stage_needs(study: Path, tiny: Path, monkeypatch: Patch, free: int, well: bool):
    """Too little memory is said; only with too little disk no stage can end well."""
    write_params(study, tiny)
    (study / "models").mkdir()
    (study / "models/dense").symlink_to(tiny)
    monkeypatch.setattr("wanda_dvc.views.doctor.free_memory", lambda _: free)
    table, ok = doctor(start=study)
    assert ok
    assert re.search(r" free; needs about: calibrate 0.1 GB, .*, zero-shot 0.2 GB", row(table, "memory"))
    assert ("✓" in row(table, "memory")) == well
    needs = json.loads(doctor(start=study, as_json=True)[0])["needs"]
    assert needs.keys() == NEEDS.keys()
    for stage, found in needs.items():
        wanted = need(Project(study), stage)
        assert found == {"memory_bytes": wanted.memory, "disk_bytes": wanted.disk}
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free // 100))
    assert doctor(start=study)[1] == well
