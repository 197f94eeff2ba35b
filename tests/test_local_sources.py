"""A local model or text is watched by its content, on a real DVC repository."""

import re
from pathlib import Path

import pytest
from conftest import ROOT, save_tiny_model
from repository import Repository, ran

from wanda_dvc.engine.checkpoint import INDEX
from wanda_dvc.errors import UserError
from wanda_dvc.sources.models import MODEL_FILES
from wanda_dvc.stages.plan import plan

CALIBRATE = {"calibrate-norms", "calibrate-gram", "calibrate-gradients"}
UP_TO_CALIBRATE = {"plan", "download-model", "download-calibration"} | CALIBRATE


def test_dvc_watches_the_files_of_a_model_that_download_takes():
    """.dvcignore hides the rest: a checkpoint's pickles would be hashed for nothing."""
    lines = (ROOT / ".dvcignore").read_text(encoding="utf-8").splitlines()
    taken = {line.removeprefix("!/sources/model/") for line in lines if line.startswith("!")}
    assert taken == {*MODEL_FILES, INDEX, "*.safetensors"}
    assert [line for line in lines if not line.startswith(("!", "#"))] == ["/sources/model/*"]


def test_a_source_is_a_link_or_a_note(tmp_path: Path, tiny: Path, project):
    text = tmp_path / "a.txt"
    text.write_text("text")
    made = project(calibration__text__source=str(text), perplexity__texts__embedded__source="embedded")
    plan(project=made)
    plan(project=made)
    assert made.source("model").readlink() == tiny
    assert made.source("calibration").readlink() == text
    assert made.source("perplexity/embedded").read_text() == '{\n  "source": "embedded"\n}\n'
    assert sorted(path.name for path in made.source("model").parent.iterdir()) == [
        "calibration", "model", "perplexity", "tasks",
    ]  # fmt: skip
    plan(project=project("org/model"))  # the link goes, and not what it leads to
    assert not made.source("model").is_symlink()
    assert (tiny / "config.json").is_file()
    with pytest.raises(UserError, match="params.yaml: model: /nowhere not found, expected a directory or a file"):
        plan(project=project(Path("/nowhere"), plan=False))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, texts: dict[str, str]) -> Repository:
    """A study of a local model and a local text, in which everything up to `calibrate` has run."""
    root = tmp_path_factory.mktemp("local")
    model = save_tiny_model(root / "tiny", num_hidden_layers=2)
    (root / "text.txt").write_text(" ".join(map(str, range(2000))))
    settings = texts | {"calibration__text__source": str(root / "text.txt")}
    repository = Repository.new(root / "study", model, settings=settings)
    assert repository.repro_up_to(*sorted(CALIBRATE)) == UP_TO_CALIBRATE
    repository.commit()
    return repository


@pytest.mark.pipeline
def test_other_content_at_the_same_path_is_seen_and_reruns_what_depends_on_it(start: Repository):
    text = start.model.with_name("text.txt")
    assert start.repro_up_to(*sorted(CALIBRATE)) == set()
    assert start.run("git", "status", "--porcelain") == ""

    save_tiny_model(start.model, num_hidden_layers=2, seed=7)  # the same names and sizes
    assert re.search(r"changed outs:\s+modified: +sources/model", start.run("dvc", "status", "plan"))
    assert start.repro_up_to(*sorted(CALIBRATE)) == {"plan", "download-model"} | CALIBRATE
    assert start.repro_up_to(*sorted(CALIBRATE)) == set()

    text.write_text(text.read_text().replace("1", "2"))
    assert start.repro_up_to(*sorted(CALIBRATE)) == {"plan", "download-calibration"} | CALIBRATE

    (start.model / "notes.bin").write_text("not taken")
    (start.model / "config.json").touch()
    assert start.repro_up_to(*sorted(CALIBRATE)) == set()
    (start.model / "LICENSE").write_text("new, and taken")
    assert start.repro_up_to("download-model") == {"plan", "download-model"}
    assert (start.root / "models/dense/LICENSE").read_text() == "new, and taken"
    (start.model / "LICENSE").unlink()
    assert start.repro_up_to(*sorted(CALIBRATE)) == {"plan"}  # and the earlier model comes from the cache


@pytest.mark.pipeline
def test_an_experiment_elsewhere_sees_the_same_sources(start: Repository):
    """Unchanged they fetch nothing there; changed they are fetched, and the workspace stays as it is."""
    start.repro_up_to(*sorted(CALIBRATE))
    start.commit()
    said = start.run("dvc", "exp", "run", "--temp", "--set-param", "++calibration.seed=3", *sorted(CALIBRATE))
    assert ran(said) == {"plan"} | CALIBRATE
    text = start.model.with_name("text.txt")
    before = text.read_text()
    text.write_text(before + " 1")
    said = start.run("dvc", "exp", "run", "--temp", "--set-param", "++calibration.seed=4", *sorted(CALIBRATE))
    assert ran(said) == {"plan", "download-calibration"} | CALIBRATE
    assert start.run("git", "status", "--porcelain") == ""
    text.write_text(before)


def test_links_stay_where_a_source_is_missing_and_go_with_their_text(tmp_path: Path, project):
    text = tmp_path / "a.txt"
    text.write_text("text")
    two = {"a": {"source": str(text)}, "embedded": {"source": "embedded"}}
    made = project(perplexity__texts=two)
    plan(project=made)
    missing = project(plan=False, perplexity__texts=two | {"z": {"source": str(tmp_path / "no.txt")}})
    with pytest.raises(UserError, match="no.txt not found"):
        plan(project=missing)
    assert made.source("perplexity/a").resolve() == text
    plan(project=project(perplexity__texts={"embedded": {"source": "embedded"}}))
    assert text.read_text() == "text"
    assert [place.name for place in made.source("perplexity").iterdir()] == ["embedded"]
