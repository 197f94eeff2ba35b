"""`wanda-dvc list`: every experiment with its state, and no number that is not its own."""

import json
import re
import shutil
from itertools import dropwhile
from pathlib import Path
from typing import Any

import pytest
from conftest import Capture, Factory, Patch
from repository import Repository
from test_docs import blocks
from test_report import write_results

import wanda_dvc as wd
from wanda_dvc.errors import UserError
from wanda_dvc.results.listing import experiments
from wanda_dvc.results.show import show
from wanda_dvc.study.project import Project

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="module")
def repository(tmp_path_factory: Factory) -> Repository:
    """A branch with results, and an experiment of each state; the workspace has been edited since."""
    root = tmp_path_factory.mktemp("list") / "study"
    repository = Repository.new(root, root)
    write_results(root, "wanda", 0.5, 2.5, 20)
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
    records = json.loads(experiments(project=Project(repository.root), as_json=True))
    return {record.pop("name"): record for record in records}


def test_each_experiment_has_its_state_and_only_its_own_numbers(repository: Repository):
    found = listed(repository)
    states = {name: record["state"] for name, record in found.items()}
    assert states == {
        "workspace": "workspace",
        "main": "branch",
        "middling": "success",
        "broken": "failed",
        "waiting": "queued",
    }
    assert {name: record["change"] for name, record in found.items()} == {
        "workspace": {},
        "main": {},
        "middling": {"recipe": "magnitude-rows"},
        "broken": {"pattern": "1:4"},
        "waiting": {"sparsity": 0.3},
    }
    values: dict[str, Any] = {name: record["results"]["pruned"] for name, record in found.items()}
    assert {name for name, one in values.items() if one} == {"workspace", "main", "middling"}
    assert {name for name, one in values.items() if "mean_acc" in one} == {"workspace", "main", "middling"}
    assert values["middling"] != values["main"] == values["workspace"]
    shown = json.loads(repository.run("dvc", "exp", "show", "--json", "--all-commits"))
    theirs = [one for state in shown for one in state["experiments"] or [] if one["name"] == "broken"]
    assert theirs[0]["revs"][0]["data"]["metrics"]["metrics/pruned/perplexity/embedded.json"]["data"]  # the branch's


def test_a_workspaces_figure_is_the_one_that_dvc_lock_names(repository: Repository):
    """After a stage by hand, or `git checkout` alone, another file lies there."""
    path = repository.root / "metrics/pruned/perplexity/embedded.json"
    before = path.read_bytes()
    path.write_text(json.dumps({"perplexity": 999.0}))
    try:
        found = listed(repository)["workspace"]
    finally:
        path.write_bytes(before)
    assert found["stale"]
    assert "perplexity" not in found["results"]["pruned"]


def test_results_are_flat_records_with_the_same_keys(repository: Repository):
    found = {record["experiment"]: record for record in wd.Study(repository.root / "metrics").results()}
    assert {name: (record["state"], record["commit"] is None) for name, record in found.items()} == {
        "workspace": ("success", True),
        "main": ("success", False),
        "middling": ("success", False),
        "broken": ("failed", False),
        "waiting": ("queued", False),
    }
    assert len({tuple(record) for record in found.values()}) == 1
    assert all(
        isinstance(value, str | int | float | bool | list | None) for one in found.values() for value in one.values()
    )
    shown = listed(repository)
    for name, record in found.items():
        pruned = shown[name]["results"]["pruned"]
        assert record["pruned.perplexity.embedded"] == pruned.get("perplexity", {}).get("embedded", {}).get("value")
        assert (record["pruned.acc.piqa"] is None) == ("acc" not in pruned)
        assert record["sparsity"] == (0.3 if name == "waiting" else 0.5)
        assert record["calibration.windows"] > 0
    assert found["middling"]["recipe"] == "magnitude-rows"
    assert found["main"]["dense.perplexity.embedded"] > 0
    assert 0 < found["main"]["pruned.sparsity"] < 1


def test_the_page_about_python_prints_what_it_says(repository: Repository, monkeypatch: Patch, capsys: Capture):
    """Its blocks run in order, in one namespace. Figures may differ by 5 %: elsewhere the model writes another text."""
    monkeypatch.chdir(repository.root.parent)
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
    assert sum(block.language == "python" for block in every) > 6
    assert not shown


def test_without_git_show_shows_and_list_says_what_to_do(tmp_path: Path):
    """Stages that were run by hand leave .dvc/, in which DVC looks for git."""
    root = tmp_path / "study"
    Repository.new(root, root)
    write_results(root, "wanda", 0.5, 2.5, 20, allocation="owl", allocation_strength=0.01)
    shutil.rmtree(root / ".git")
    assert "perplexity" in show(project=Project(root))
    with pytest.raises(UserError, match="no git repository; run `git init`"):
        experiments(project=Project(root))


def test_an_edit_takes_the_workspaces_numbers_away(repository: Repository):
    path = repository.root / "params.yaml"
    before = path.read_text(encoding="utf-8")
    try:
        path.write_text(before.replace("sparsity: 0.5", "sparsity: 0.9"), encoding="utf-8")
        found = listed(repository)["workspace"]
        results = found.pop("results")
        assert found == {"state": "workspace", "change": {"sparsity": 0.9}, "stale": True}
        assert results["pruned"] == {}
        assert results["dense"] == listed(repository)["main"]["results"]["dense"]  # of any sparsity
        said = experiments(project=Project(repository.root))
    finally:
        path.write_text(before, encoding="utf-8")
    assert "No numbers of stages that have not run on the current settings: workspace." in said
    assert "sparsity=0.9" in said


def test_experiments_stand_side_by_side_with_paired_tests(repository: Repository):
    said = show(project=Project(repository.root), names=["main", "middling"])
    header = next(line for line in said.splitlines() if line.startswith("|"))
    assert [cell.strip() for cell in header.split("|")[1:-1]] == [
        "", "dense", "main", "middling", "middling against main",
    ]  # fmt: skip
    row = next(line for line in said.splitlines() if line.startswith("| perplexity "))
    assert "2.718 × " in row
    assert row.rstrip(" |").endswith("*")
    assert "main: /models/tiny: wanda, sparsity 0.5, pattern unstructured" in said
    found = json.loads(show(project=Project(repository.root), names=["middling"], as_json=True))
    assert found["models"]["middling"]["tests"][0]["measure"] == "perplexity"
    with pytest.raises(UserError, match="nothing: no experiment, commit, branch or tag of that name"):
        show(project=Project(repository.root), names=["nothing"])
