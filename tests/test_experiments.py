"""`list`, `report`, and the Python interface, which runs the pipeline: experiments with their state and own numbers."""

import json
import re
import shutil
from itertools import dropwhile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Capture, Factory, Patch, save_tiny_model
from experiment_files import write_results
from page_blocks import blocks
from repository import Repository
from transformers import AutoModelForCausalLM

import wanda_dvc as wd
from wanda_dvc.errors import UserError
from wanda_dvc.results.listing import list_text
from wanda_dvc.results.report import report
from wanda_dvc.results.show import show
from wanda_dvc.study import dvc
from wanda_dvc.study.files import load_json, write_json
from wanda_dvc.study.folder import Study

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="module")
def repository(tmp_path_factory: Factory) -> Repository:
    """A branch with results, and an experiment of each state; the workspace has been edited since."""
    root = tmp_path_factory.mktemp("list") / "study"
    repository = Repository.new(root, root, below="..")
    write_results(root, "wanda", 0.5, 2.5, 20)
    write_json(root / "models/dense/config.json", {"vocab_size": 260})
    repository.save("main")
    write_results(root, "magnitude-rows", 0.5, 3.5, 4)
    repository.save("middling")
    repository.run("git", "checkout", "--", ".")
    repository.run("dvc", "checkout", "--force")
    repository.run("dvc", "exp", "run", "--queue", "--name", "broken", "--set-param", "pattern=1:4")
    repository.run("dvc", "exp", "run", "--run-all", check=False)
    repository.run("dvc", "exp", "run", "--queue", "--name", "waiting", "--set-param", "sparsity=0.3")
    return repository


def listed(repository: Repository) -> dict[str, dict[str, Any]]:
    records = json.loads(list_text(study=Study(repository.root), as_json=True))
    return {record["experiment"]: record for record in records}


def test_each_experiment_has_its_state_and_only_its_own_numbers(repository: Repository):
    found = listed(repository)
    states = {name: record["state"] for name, record in found.items()}
    finished = dict.fromkeys(("workspace", "main", "middling"), "success")
    assert states == finished | {"broken": "failed", "waiting": "queued"}
    changed = ("recipe", "pattern", "sparsity")
    assert {name: tuple(record[key] for key in changed) for name, record in found.items()} == {
        "workspace": ("wanda", "unstructured", 0.5),
        "main": ("wanda", "unstructured", 0.5),
        "middling": ("magnitude-rows", "unstructured", 0.5),
        "broken": ("wanda", "1:4", 0.5),
        "waiting": ("wanda", "unstructured", 0.3),
    }
    values = {name: {key: x for key, x in one.items() if key.startswith("pruned.")} for name, one in found.items()}
    assert {name for name, one in values.items() if set(one.values()) != {None}} == {"workspace", "main", "middling"}
    assert {name for name, one in values.items() if one["pruned.mean_acc"]} == {"workspace", "main", "middling"}
    assert values["middling"] != values["main"] == values["workspace"]
    shown = json.loads(repository.run("dvc", "exp", "show", "--json", "--all-commits"))
    theirs = [one for state in shown for one in state["experiments"] or [] if one["name"] == "broken"]
    assert theirs[0]["revs"][0]["data"]["metrics"]["metrics/pruned/perplexity/embedded.json"]["data"]  # the branch's


@pytest.mark.timeout(120)
def test_a_blob_that_is_gone_is_missing_and_no_wait_for_ever(tmp_path: Path):
    repository = Repository.new(tmp_path / "study", tmp_path)
    repository.commit()
    blob = repository.run("git", "rev-parse", "HEAD:params.yaml").strip()
    (repository.root / ".git/objects" / blob[:2] / blob[2:]).unlink()
    assert dvc.Revision.open(repository.root, "HEAD").take("params.yaml", tmp_path / "new") == ["params.yaml"]


def test_a_workspaces_figure_is_the_one_that_dvc_lock_names(repository: Repository):
    """After a stage by hand, or `git checkout` alone, another file lies there."""
    path = repository.root / "metrics/pruned/perplexity/embedded.json"
    before = path.read_bytes()
    path.write_text(json.dumps({"perplexity": 999.0}))
    try:
        found = listed(repository)["workspace"]
    finally:
        path.write_bytes(before)
    assert found["pruned.perplexity.embedded"] is None


def test_results_are_flat_records_with_the_same_keys(repository: Repository):
    found = {record["experiment"]: record for record in wd.Study(repository.root / "metrics").results()}
    assert [name for name, record in found.items() if record["commit"] is None] == ["workspace"]
    assert len({tuple(record) for record in found.values()}) == 1
    assert all(isinstance(x, str | int | float | bool | list | None) for one in found.values() for x in one.values())
    assert found == listed(repository)
    assert all(record["calibration.windows"] > 0 for record in found.values())
    assert found["main"]["dense.perplexity.embedded"] > 0
    assert 0 < found["main"]["pruned.sparsity"] < 1


def test_the_python_page_prints_as_it_says(repository: Repository, tmp_path: Path, monkeypatch: Patch, capsys: Capture):
    """Its blocks run in order, in one namespace. Figures may differ by 5 %: elsewhere the model writes another text."""
    (tmp_path / "study").symlink_to(repository.root)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    shown, page = "", [block for block in blocks("docs/python.md") if block.language in ("python", "text")]
    every = list(dropwhile(lambda block: block.language == "text", page))  # the example at the top needs the Hub
    for block in every:
        if block.language == "text":
            number = r"-?\d+(?:\.\d+)?"
            assert re.sub(number, "#", shown) == re.sub(number, "#", block.text)
            figures = [[float(found) for found in re.findall(number, text)] for text in (shown, block.text)]
            assert figures[0] == pytest.approx(figures[1], rel=0.05)
            shown = ""
        else:
            assert not shown, "a block without its output"
            exec(compile(block.text, "docs/python.md", "exec"), namespace)
            shown = capsys.readouterr().out
    assert sum(block.language == "python" for block in every) >= 6
    assert not shown


def test_a_repository_is_reported(repository: Repository, tmp_path: Path):
    """Of experiments in git and DVC's cache; an earlier commit's numbers, and those of edited settings, are not its."""
    output = tmp_path / "report.html"
    repository.run("dvc", "exp", "branch", "middling", "kept")  # one experiment under two names
    said = report(study=Study(repository.root), output=output)
    repository.run("git", "branch", "-D", "kept")
    assert said == f"{output}: middling, main"
    text = output.read_text(encoding="utf-8")
    assert re.search(r": wanda, sparsity 0.5 against [^:]+: magnitude-rows, sparsity 0.5", text)
    assert str(repository.root) not in text
    assert repository.run("git", "status", "--porcelain") == ""
    report(study=Study(repository.root), output=output, revs=["middling"])
    assert "wanda, sparsity 0.5" not in output.read_text(encoding="utf-8")


def test_without_git_show_shows_and_list_says_what_to_do(tmp_path: Path):
    """Stages that were run by hand leave .dvc/, in which DVC looks for git."""
    root = tmp_path / "study"
    Repository.new(root, root)
    write_results(root, "wanda", 0.5, 2.5, 20, allocation="owl")
    shutil.rmtree(root / ".git")
    assert "perplexity" in show(study=Study(root))
    with pytest.raises(UserError, match="no git repository; `wanda-dvc init DIR --from"):
        list_text(study=Study(root))
    Repository(root, root).run("git", "init", "--quiet")
    with pytest.raises(UserError, match="git has no commit; `git add .`, then `git commit -m Begin`"):
        list_text(study=Study(root))


def test_an_edit_takes_the_workspaces_numbers_away(repository: Repository):
    path = repository.root / "params.yaml"
    before = path.read_text(encoding="utf-8")
    try:
        path.write_text(before.replace("sparsity: 0.5", "sparsity: 0.9"), encoding="utf-8")
        found = listed(repository)["workspace"]
        main = listed(repository)["main"]
        assert (found["sparsity"], main["sparsity"]) == (0.9, 0.5)
        assert {found[key] for key in found if key.startswith("pruned.")} == {None}
        of_dense = [key for key in found if key.startswith("dense.")]
        assert [found[key] for key in of_dense] == [main[key] for key in of_dense]  # of any sparsity
        said = list_text(study=Study(repository.root))
    finally:
        path.write_text(before, encoding="utf-8")
    assert "sparsity=0.9" in said


def test_experiments_stand_side_by_side_with_paired_tests(repository: Repository):
    said = show(study=Study(repository.root), names=["main", "middling"])
    header = next(line for line in said.splitlines() if line.startswith("|"))
    assert [cell.strip() for cell in header.split("|")[1:-1]] == [
        "", "dense", "main", "middling", "middling against main",
    ]  # fmt: skip
    row = next(line for line in said.splitlines() if line.startswith("| perplexity "))
    assert "2.718 × " in row
    assert row.rstrip(" |").endswith("*")
    assert "main: /models/tiny: wanda, sparsity 0.5" in said
    found = json.loads(show(study=Study(repository.root), names=["middling"], as_json=True))
    assert found["models"]["middling"]["tests"][0]["measure"] == "perplexity"
    with pytest.raises(UserError, match="nothing: no experiment, commit, branch or tag of that name"):
        show(study=Study(repository.root), names=["nothing"])


def test_a_damaged_lock_is_named_and_no_row_of_the_list(repository: Repository):
    path = repository.root / "dvc.lock"
    before = path.read_text(encoding="utf-8")
    path.write_text(before + "<<<<<<< HEAD\n", encoding="utf-8")
    try:
        with pytest.raises(UserError, match=r"^dvc.lock: not valid YAML: line \d+.*resolve the conflict"):
            list_text(study=Study(repository.root))
    finally:
        path.write_text(before, encoding="utf-8")


@pytest.fixture(scope="module")
def study(tmp_path_factory: Factory, texts: dict[str, str]) -> wd.Study:
    folder = save_tiny_model(tmp_path_factory.mktemp("tiny"), num_hidden_layers=2)
    source = {"source": texts["calibration__text__source"], "split": None}
    measured = {"embedded": {"source": texts["perplexity__texts__embedded__source"], "split": None}}
    settings: dict[str, Any] = {"perplexity": {"length": 64, "windows": 4, "texts": measured}, "dtype": "float32"}
    settings |= {"calibration": {"windows": 3, "length": 64, "text": source}}
    return wd.calibrate(folder, tmp_path_factory.mktemp("made") / "study", **settings)


def test_a_study_gives_masks_a_model_and_figures(study: wd.Study):
    assert study.path.joinpath("dvc.lock").is_file()
    norm = study.statistics(0).inputs["model.layers.0.self_attn.q_proj"].norm
    assert norm.shape == (32,)
    keep = wd.mask(study, recipe="wanda", sparsity=0.5)
    assert {float(one.float().mean()) for one in keep.values()} == {0.5}
    pruned = wd.prune(study, recipe="wanda").state_dict()
    dense = AutoModelForCausalLM.from_pretrained(study.path / "models/dense").state_dict()
    for name, weight in dense.items():
        mask = keep[linear] if (linear := name.removesuffix(".weight")) in keep else torch.tensor(True)
        assert torch.equal(pruned[name], weight * mask), name
    measured = wd.perplexity(study, "dense"), wd.perplexity(study)
    files = [load_json(study.path / f"metrics/{one}/perplexity/embedded.json") for one in ("dense", "pruned")]
    assert list(measured) == [one["perplexity"] for one in files]
    assert measured[0] != measured[1]
    workspace = study.results()[0]
    assert (workspace["sparsity"], workspace["pruned.perplexity.embedded"]) == (0.5, measured[1])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sparsity": 2}, "sparsity"),
        ({"calibration": {"nope": 1}}, "calibration.nope: no such setting"),
        ({"recipe": "wand"}, "recipe"),
        ({"model": 5}, "model: found 5, expected a valid string"),
    ],
)
def test_a_wrong_setting_is_named_and_changes_nothing(study: wd.Study, settings: dict[str, Any], says: str):
    before = (study.path / "params.yaml").read_bytes()
    with pytest.raises(wd.UserError, match=says):
        wd.mask(study, **settings)
    assert (study.path / "params.yaml").read_bytes() == before


def test_a_failed_stage_is_an_error_with_its_message(study: wd.Study):
    with pytest.raises(wd.UserError, match="2:3"):
        wd.mask(study, pattern="2:3")
    wd.mask(study, pattern="unstructured")


def test_all_names_are_there_and_no_others():
    for name in wd.__all__:
        assert getattr(wd, name)
    with pytest.raises(AttributeError, match="prunes"):
        _ = wd.prunes
