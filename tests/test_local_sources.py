"""A local model or text is watched by its content, and a study is shared with a team, on a real DVC repository."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from c4 import SHARD
from conftest import ROOT, Factory, git, save_tiny_model
from dvc.repo import Repo
from repository import CALIBRATE, DOWNLOADS, EVALUATE, PRUNE, Repository, ran

from wanda_dvc.engine.checkpoint import INDEX
from wanda_dvc.errors import UserError
from wanda_dvc.sources.models import MODEL_FILES
from wanda_dvc.stages.plan import plan
from wanda_dvc.study.dvc import list_revisions
from wanda_dvc.study.scaffold import PIPELINE

UP_TO_CALIBRATE = {"plan", "download-model", "download-calibration"} | CALIBRATE


def test_dvc_watches_the_files_of_a_model_that_download_takes():
    """.dvcignore hides the rest: a checkpoint's pickles would be hashed for nothing."""
    lines = (ROOT / ".dvcignore").read_text(encoding="utf-8").splitlines()
    taken = {line.removeprefix("!/sources/model/") for line in lines if line.startswith("!")}
    assert taken == {*MODEL_FILES, INDEX, "*.safetensors"}
    assert [line for line in lines if not line.startswith(("!", "#"))] == ["/sources/model/*"]


def test_a_source_is_a_link_or_a_note(tmp_path: Path, tiny: Path, study):
    text = tmp_path / "a.txt"
    text.write_text("text")
    for name in ("embedded", "none"):  # no source is looked for there
        (tmp_path / name).mkdir()
    made = study(calibration__text__source=str(text), perplexity__texts__embedded__source="embedded")
    plan(study=made)
    plan(study=made)
    assert made.source("model").readlink() == tiny
    assert made.source("calibration").readlink() == text
    assert made.source("perplexity/embedded").read_text() == '{\n  "source": "embedded"\n}\n'
    sources = sorted(path.name for path in made.source("model").parent.iterdir())
    assert sources == ["calibration", "method", "model", "perplexity", "recovery", "tasks"]
    plan(study=study("org/model"))  # the link goes, and not what it leads to
    assert not made.source("model").is_symlink()
    assert (tiny / "config.json").is_file()
    with pytest.raises(UserError, match="params.yaml: model: /nowhere not found, or no file"):
        plan(study=study(Path("/nowhere"), plan=False))
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/model.safetensors").symlink_to("removed")
    with pytest.raises(UserError, match="model: .*linked/model.safetensors is a link to a missing file; copy the file"):
        plan(study=study(tmp_path / "linked", plan=False))
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match="calibration.text.source: .*pipe.txt not found, or no file and no directory"):
        plan(study=study(calibration__text__source=str(tmp_path / "pipe.txt"), plan=False))


def test_dvc_sees_which_mirror_is_read_and_each_text_in_it(tmp_path: Path, study):
    mirror, wikitext = tmp_path / "mirror", Path("Salesforce/wikitext/wikitext-2-raw-v1")
    for file in (wikitext / "train.jsonl", wikitext / "test.jsonl", Path("allenai/c4", SHARD)):
        (mirror / file).parent.mkdir(parents=True, exist_ok=True)
        (mirror / file).touch()
    texts = {"named": {"source": "wikitext2"}, "not_there": {"source": "ptb"}, "embedded": {"source": "embedded"}}
    settings = {"calibration__text": [{"source": "c4"}, {"source": "wikitext2"}], "tasks__source": "benchmark"}
    made = study(**settings, perplexity__texts=texts, runtime__mirror=str(mirror))
    assert made.source("calibration/0").readlink() == mirror / "allenai/c4" / SHARD
    assert made.source("calibration/1").readlink() == mirror / wikitext / "train.jsonl"
    assert made.source("perplexity/named").readlink() == mirror / wikitext / "test.jsonl"
    notes = [made.source(name).read_text() for name in ("perplexity/not_there", "perplexity/embedded", "tasks")]
    assert [json.loads(note)["source"] for note in notes] == ["ptb", "embedded", f"benchmark in {mirror}"]


@pytest.fixture(scope="module")
def start(tmp_path_factory: Factory, texts: dict[str, str]) -> Repository:
    """A study of a local model and a local text, in which everything up to `calibrate` has run."""
    root = tmp_path_factory.mktemp("local")
    model = save_tiny_model(root / "tiny", num_hidden_layers=2)
    (root / "text.txt").write_text(" ".join(map(str, range(2000))))
    settings = texts | {"calibration__text__source": str(root / "text.txt")}
    repository = Repository.new(root / "study", model, settings=settings)
    assert repository.repro(*sorted(CALIBRATE)) == UP_TO_CALIBRATE
    repository.commit()
    return repository


@pytest.mark.pipeline
def test_other_content_at_the_same_path_is_seen_and_reruns_what_depends_on_it(start: Repository):
    text = start.model.with_name("text.txt")
    assert start.repro(*sorted(CALIBRATE)) == set()
    assert start.run("git", "status", "--porcelain") == ""

    save_tiny_model(start.model, num_hidden_layers=2, seed=7)  # the same names and sizes
    assert re.search(r"changed outs:\s+modified: +sources/model", start.run("dvc", "status", "plan"))
    assert start.repro(*sorted(CALIBRATE)) == {"plan", "download-model"} | CALIBRATE
    assert start.repro(*sorted(CALIBRATE)) == set()

    text.write_text(text.read_text().replace("1", "2"))
    assert start.repro(*sorted(CALIBRATE)) == {"plan", "download-calibration"} | CALIBRATE

    (start.model / "notes.bin").write_text("not taken")
    (start.model / "config.json").touch()
    assert start.repro(*sorted(CALIBRATE)) == set()
    (start.model / "LICENSE").write_text("new, and taken")
    assert start.repro("download-model") == {"plan", "download-model"}
    assert (start.root / "models/dense/LICENSE").read_text() == "new, and taken"
    (start.model / "LICENSE").unlink()
    assert start.repro(*sorted(CALIBRATE)) == {"plan"}  # and the earlier model comes from the cache


def test_links_stay_where_a_source_is_missing_and_go_with_their_text(tmp_path: Path, study):
    text = tmp_path / "a.txt"
    text.write_text("text")
    two = {"a": {"source": str(text)}, "embedded": {"source": "embedded"}}
    made = study(perplexity__texts=two)
    plan(study=made)
    missing = study(plan=False, perplexity__texts=two | {"z": {"source": str(tmp_path / "no.txt")}})
    with pytest.raises(UserError, match="no.txt not found"):
        plan(study=missing)
    assert made.source("perplexity/a").resolve() == text
    plan(study=study(perplexity__texts={"embedded": {"source": "embedded"}}))
    assert text.read_text() == "text"
    assert [place.name for place in made.source("perplexity").iterdir()] == ["embedded"]


@pytest.mark.pipeline
@pytest.mark.parametrize("options", ["", pytest.param(": { cache: false }", marks=pytest.mark.full)])
def test_a_clone_pulls_and_continues_without_a_calibration(tmp_path: Path, texts: dict[str, str], options: str):
    model = save_tiny_model(tmp_path / "tiny", num_hidden_layers=2)
    mine = Repository.new(tmp_path / "mine", model, settings=texts | {"tasks__names": []})
    text = (ROOT / PIPELINE).read_text(encoding="utf-8")
    sources = r"(outs:\n +- (?:models/dense|data/calibration|data/tasks|data/perplexity/.*))\n"
    (mine.root / PIPELINE).write_text(re.sub(sources, rf"\1{options}\n", text), encoding="utf-8")
    mine.repro()
    mine.run("dvc", "remote", "add", "--default", "team", str(tmp_path / "remote"))
    mine.commit()
    mine.run("dvc", "push")
    weights = {path.stat().st_size for path in (tmp_path / "remote").rglob("*") if path.is_file()}
    assert ((model / "model.safetensors").stat().st_size in weights) == (options == "")

    mine.run("git", "clone", "--quiet", str(mine.root), str(tmp_path / "theirs"))
    theirs = replace(mine, root=tmp_path / "theirs")
    assert "ERROR" not in theirs.run("dvc", "pull")  # and it ends with 0, as each `run` here
    for folder in ("stats/norms", "stats/gram", "stats/fisher", "masks", "weights", "metrics/details"):
        assert (theirs.root / folder).is_dir()
    fetched = set() if options == "" else DOWNLOADS  # from the source, to the same bytes
    assert theirs.repro(sparsity=0.7) == {"plan"} | PRUNE | EVALUATE | fetched
    assert (theirs.root / "models/dense").is_dir()
    assert "calibrate" not in ran(theirs.run("dvc", "repro"))


def test_commits_without_experiments_are_not_read(tmp_path: Path):
    """`list` and `report` read every commit of the repository: minutes in a large one."""
    git(tmp_path, "init", "--quiet")
    Repo.init(str(tmp_path)).close()
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    revs = []
    for number in range(4):
        (tmp_path / "params.yaml").write_text(f"sparsity: 0.{number}\n")
        git(tmp_path, "add", ".")
        git(tmp_path, "commit", "--quiet", "--message", f"{number}")
        revs.append(git(tmp_path, "rev-parse", "HEAD"))
        if number == 1:
            (tmp_path / "params.yaml").write_text("sparsity: 0.9\n")
            with Repo(str(tmp_path)) as repo:
                repo.experiments.save(name="an-experiment")
            git(tmp_path, "checkout", "--", ".")
    records = list_revisions(tmp_path)
    assert {record["rev"] for record in records} == {"workspace", revs[3], revs[1]}
    experiments = [experiment for record in records for experiment in record["experiments"] or []]
    assert [experiment["name"] for experiment in experiments] == ["an-experiment"]
