"""A study shared with a team: what a second person gets, and what never leaves the machine."""

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, save_tiny_model
from repository import Repository as Study
from repository import ran

from wanda_dvc.study.project import Project
from wanda_dvc.study.scaffold import PIPELINE

PRUNE = {"plan", "mask", "apply", "perplexity-pruned@embedded", "zero-shot-pruned"}
DOWNLOADS = {"download-model", "download-calibration", "download-perplexity@embedded", "download-tasks"}


def with_outs(root: Path, options: str) -> Project:
    """A study whose dvc.yaml says this of the sources."""
    text = (ROOT / PIPELINE).read_text(encoding="utf-8")
    for out in ("models/dense", "data/calibration", "data/tasks", "data/perplexity/${key}"):
        text = text.replace(f"outs:\n      - {out}\n", f"outs:\n      - {out}{options}\n")
        text = text.replace(f"outs:\n        - {out}\n", f"outs:\n        - {out}{options}\n")
    (root / PIPELINE).write_text(text, encoding="utf-8")
    return Project(root)


@pytest.mark.pipeline
@pytest.mark.parametrize("options", ["", pytest.param(": { cache: false }", marks=pytest.mark.full)])
def test_a_clone_pulls_and_continues_without_a_calibration(tmp_path: Path, texts: dict[str, str], options: str):
    model = save_tiny_model(tmp_path / "tiny", num_hidden_layers=2)
    mine = Study.new(tmp_path / "mine", model, settings=texts | {"tasks__names": []})
    with_outs(mine.root, options)
    mine.repro()
    mine.run("dvc", "remote", "add", "--default", "team", str(tmp_path / "remote"))
    mine.commit()
    mine.run("dvc", "push")
    weights = {path.stat().st_size for path in (tmp_path / "remote").rglob("*") if path.is_file()}
    assert ((model / "model.safetensors").stat().st_size in weights) == (options == "")

    mine.run("git", "clone", "--quiet", str(mine.root), str(tmp_path / "theirs"))
    theirs = replace(mine, root=tmp_path / "theirs")
    assert "ERROR" not in theirs.run("dvc", "pull")  # and it ends with 0, as each `run` here
    for folder in ("stats/norms", "stats/gram", "stats/gradients", "masks", "weights", "metrics/details"):
        assert (theirs.root / folder).is_dir()
    fetched = set() if options == "" else DOWNLOADS  # from the source, to the same bytes
    assert theirs.repro(sparsity=0.7) == PRUNE | fetched
    assert (theirs.root / "models/dense").is_dir()
    assert "calibrate" not in ran(theirs.run("dvc", "repro"))
