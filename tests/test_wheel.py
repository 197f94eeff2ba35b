"""The wheel as a user gets it, without the heavy libraries: its contents, and a study that it makes on its own.

`scripts/wheel.sh` installs it into a fresh environment and runs the default study to the end.
"""

import json
import re
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Patch, git, save_tiny_model
from repository import Repository, ran

from wanda_dvc import __version__
from wanda_dvc.study.scaffold import changed


def build(what: str, source: Path, target: Path) -> Path:
    """An archive that hatchling builds; nothing is fetched or installed."""
    code = f"from hatchling.build import build_{what}; print(build_{what}({str(target)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    if "No module named 'hatchling'" in done.stderr:
        pytest.fail("hatchling is not installed, expected it among the `dev` extra; run `make install`")
    assert done.returncode == 0, done.stderr
    return target / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The contents of the wheel that the sdist alone builds, as installers build it where there is no wheel."""
    built, target = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("site")
    sdist = build("sdist", ROOT, built)
    with tarfile.open(sdist) as archive:
        archive.extractall(built, filter="data")
    with zipfile.ZipFile(build("wheel", built / sdist.name.removesuffix(".tar.gz"), built)) as wheel:
        wheel.extractall(target)
    return target


def test_it_carries_the_package_and_nothing_else(unpacked: Path):
    listed = git(ROOT / "src", "ls-files", "--cached", "--others", "--exclude-standard").split("\n")
    there = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    package = {path for path in there if not re.match(r"wanda_dvc-[^/]*\.dist-info/", path)}
    assert package == {path for path in listed if path and (ROOT / "src" / path).exists()}
    assert {"wanda_dvc/py.typed", "wanda_dvc/study/template/pipeline.yaml"} <= package
    (metadata,) = unpacked.glob("*.dist-info/METADATA")
    text = metadata.read_text(encoding="utf-8")
    assert "Provides-Extra: report" in text
    assert "Project-URL: Paper" in text
    assert "you want" in text
    assert "License-Expression: Apache-2.0 AND PSF-2.0" in text
    assert len([*metadata.parent.glob("licenses/**/LICENSE*")]) == 2
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert "](docs/" not in text  # a package index has no such files


@pytest.mark.pipeline
def test_it_runs_the_study_and_an_experiment(unpacked: Path, tmp_path: Path, monkeypatch: Patch):
    """The commands that `init` names, one after the other, in a part of a git repository too. They are forks."""
    monkeypatch.setenv("PYTHONPATH", str(unpacked))
    model = save_tiny_model(tmp_path / "tiny", num_hidden_layers=2)
    around = Repository(tmp_path / "around", model, imported_with={"PYTHONPATH": str(unpacked)})
    calibrated_study = replace(around, root=around.root / "study")
    around.root.mkdir()
    around.run("git", "init", "--quiet")
    (around.root / "code.py").write_text("")
    said = around.run("wanda-dvc", "init", "study", "--model", str(model))
    small: dict[str, Any] = {"calibration": {"windows": 2, "length": 64}, "perplexity": {"length": 64, "windows": 2}}
    small |= {"tasks": {"names": ["piqa"], "limit": 2}}
    file = calibrated_study.root / "params.yaml"
    file.write_text(changed(file.read_text(), small)[1])
    named = re.findall(r"^  ((?:git|dvc|wanda-dvc) .*?)(?: {2,}#.*)?$", said, flags=re.MULTILINE)
    assert [command.partition(" ")[0] for command in named] == ["git", "dvc", "wanda-dvc", "dvc"]
    printed = [calibrated_study.run("sh", "-c", command) for command in named]
    assert "calibrate-norms" in ran(printed[1])
    assert "measured sparsity" in printed[2]
    assert "calibrate-norms" not in ran(printed[3])
    assert "0.3" in calibrated_study.run("wanda-dvc", "list")
    # As the DVC extension of VS Code asks.
    plotted = "dvc plots diff workspace HEAD -o .dvc/tmp/plots --split --json 2> /dev/null"
    plots = json.loads(calibrated_study.run("sh", "-c", plotted))
    drawn = {"accuracy by task", "sparsity by block"}
    assert drawn <= {name.removeprefix("dvc.yaml::") for name in plots["data"]}
    assert all(one["revisions"] for one in plots["data"]["sparsity by block"])
    tracked = json.loads(calibrated_study.run("dvc", "data", "status", "--granular", "--unchanged", "--json"))
    assert not {"not_in_cache"} & tracked.keys()
    assert any(path.startswith("masks") for kind in tracked["committed"].values() for path in kind)
    assert git(around.root, "status", "--porcelain", "code.py") == "?? code.py"
