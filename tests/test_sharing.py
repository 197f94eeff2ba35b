"""A study shared with a team: what a second person gets, and what never leaves the machine."""

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, save_tiny_model, write_params
from repository import Repository as Study
from repository import ran

from wanda_dvc.params import Tasks, Text
from wanda_dvc.sources.hub import Repository
from wanda_dvc.sources.models import find_model
from wanda_dvc.sources.tasks import find_tasks
from wanda_dvc.sources.texts import find_text
from wanda_dvc.stages import run
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


GATED = Repository("dataset", "org/gated", "c" * 40, ("model.safetensors",), "where", gated=True)
OPEN = Repository("dataset", "org/open", "c" * 40, (), "where")


def test_every_source_tells_what_is_gated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text, file = Text(source="org/gated").chosen, tmp_path / "a.txt"
    file.write_text("a text", encoding="utf-8")
    for origin, expected in ((GATED, ("org/gated",)), (OPEN, ())):
        for part in ("models", "texts"):
            monkeypatch.setattr(f"wanda_dvc.sources.{part}.resolve", lambda *_, origin=origin: origin)
        assert find_model("org/gated").gated == find_text("calibration.text", text, None).gated == expected
    assert find_text("calibration.text", Text(source=str(file)).chosen, None).gated == ()
    origins = iter((GATED, OPEN, GATED))
    monkeypatch.setattr("wanda_dvc.sources.tasks.resolve", lambda *_: next(origins))
    tasks = Tasks(source="benchmark", names=["piqa", "hellaswag", "arc_easy"])
    assert find_tasks(tasks, None).gated == ("org/gated",)
    assert next(origins, None) is None


def test_a_gated_model_is_fetched_with_a_line_that_says_what_is_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    write_params(tmp_path, "org/gated")
    monkeypatch.setattr("wanda_dvc.sources.models.resolve", lambda *_: GATED)
    fetched: list[object] = []
    monkeypatch.setattr("wanda_dvc.sources.models._write_hub", lambda *words: fetched.append(words))
    run("download", project=Project(tmp_path), part="model")
    assert len(fetched) == 1
    assert "org/gated is gated or private, and `dvc push` shares it" in capsys.readouterr().err


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
