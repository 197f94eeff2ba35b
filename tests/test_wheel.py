"""The wheel as a user gets it, without the heavy libraries: its contents, and a study that it makes on its own.

`scripts/wheel.sh` installs it into a fresh environment and runs the default study to the end.
"""

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, git, save_tiny_model
from forks import commands
from repository import command_environment, ran
from ruamel.yaml import YAML

from wanda_dvc.params import nested
from wanda_dvc.study.scaffold import updated


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


@pytest.fixture
def environment(unpacked: Path, tmp_path: Path) -> dict[str, str]:
    """An environment in which the package is the wheel's, and `wanda-dvc` a command."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "wanda-dvc").write_text(f"#!{sys.executable}\nfrom wanda_dvc.cli import run\nrun()\n")
    (folder / "wanda-dvc").chmod(0o755)
    there = command_environment(real=True)
    path = f"{folder}{os.pathsep}{there['PATH']}"
    return there | {"PYTHONPATH": str(unpacked), "PATH": path, "PYTHONSAFEPATH": "1"}


def run(*words: str, cwd: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_carries_the_package_and_nothing_else(unpacked: Path):
    listed = git(ROOT / "src", "ls-files", "--cached", "--others", "--exclude-standard").split("\n")
    there = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    package = {path for path in there if not re.match(r"wanda_dvc-[^/]*\.dist-info/", path)}
    assert package == {path for path in listed if path and (ROOT / "src" / path).exists()}
    assert {"wanda_dvc/py.typed", "wanda_dvc/study/template/pipeline.yaml"} <= package
    (metadata,) = unpacked.glob("*.dist-info/METADATA")
    assert "Provides-Extra: report" in metadata.read_text(encoding="utf-8")


@pytest.mark.pipeline
def test_it_runs_the_study_and_an_experiment(unpacked: Path, environment: dict[str, str], tmp_path: Path):
    """The commands that `init` names, one after the other, in a part of a git repository too. They are forks."""
    environment = environment | {"PATH": f"{commands(PYTHONPATH=str(unpacked))}{os.pathsep}{environment['PATH']}"}
    model = save_tiny_model(tmp_path / "tiny", num_hidden_layers=2)
    run("git", "init", "--quiet", "around", cwd=tmp_path, environment=environment)
    (tmp_path / "around/code.py").write_text("")
    said = run("wanda-dvc", "init", "study", "--model", str(model), cwd=tmp_path / "around", environment=environment)
    study = tmp_path / "around/study"
    small: dict[str, Any] = {"calibration.windows": 2, "calibration.length": 64}
    small |= {"perplexity.length": 64, "perplexity.windows": 2}
    small |= {"tasks.names": ["piqa"], "zero_shot.limit": 2}
    content = YAML(typ="safe").load(study / "params.yaml")
    YAML().dump(updated(content, nested(small)), study / "params.yaml")
    named = re.findall(r"^  ((?:git|dvc|wanda-dvc) .*?)(?: {2,}#.*)?$", said, flags=re.MULTILINE)
    assert [command.partition(" ")[0] for command in named] == ["git", "dvc", "wanda-dvc", "dvc"]
    printed = [run("sh", "-c", command, cwd=study, environment=environment) for command in named]
    assert "calibrate-norms" in ran(printed[1])
    assert "measured sparsity" in printed[2]
    assert "calibrate-norms" not in ran(printed[3])
    assert "0.3" in run("wanda-dvc", "list", cwd=study, environment=environment)
    # As the DVC extension of VS Code asks.
    plotted = ("dvc", "plots", "diff", "workspace", "HEAD", "-o", ".dvc/tmp/plots", "--split", "--json")
    plots = json.loads(run(*plotted, cwd=study, environment=environment))
    drawn = {"metrics/plots/perplexity/embedded.csv", "sparsity by block", "input norms by block"}
    assert drawn <= {name.removeprefix("dvc.yaml::") for name in plots["data"]}
    assert all(one["revisions"] for one in plots["data"]["sparsity by block"])
    asked = ("dvc", "data", "status", "--granular", "--unchanged", "--json")
    tracked = json.loads(run(*asked, cwd=study, environment=environment))
    assert not {"not_in_cache"} & tracked.keys()
    assert any(path.startswith("masks") for kind in tracked["committed"].values() for path in kind)
    assert run("git", "status", "--porcelain", "code.py", cwd=study.parent, environment=environment) == "?? code.py\n"
