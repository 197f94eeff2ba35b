"""`wanda-dvc list`: every experiment with its state, and no number that is not its own."""

import json

import pytest
from repository import Repository
from test_report import write_results

from wanda_dvc.study.project import Project
from wanda_dvc.views.experiments import experiments

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A branch with results, and an experiment of each state; the workspace has been edited since."""
    root = tmp_path_factory.mktemp("list") / "study"
    repository = Repository.new(root, root)
    write_results(root, "wanda", 0.5, 2.5, 20)
    repository.save("main")
    write_results(root, "magnitude", 0.5, 3.5, 4)
    repository.save("middling")
    repository.run("git", "checkout", "--", ".")
    repository.run("dvc", "checkout", "--force")
    repository.run("dvc", "exp", "run", "--queue", "--name", "broken", "--set-param", "pattern=1:4")
    repository.run("dvc", "exp", "run", "--run-all", check=False)
    repository.run("dvc", "exp", "run", "--queue", "--name", "waiting", "--set-param", "sparsity=0.3")
    return repository


def listed(repository: Repository) -> dict[str, dict[str, object]]:
    records = json.loads(experiments(project=Project(repository.root), as_json=True))
    return {record.pop("name"): record for record in records}


def test_each_experiment_has_its_state_and_only_its_own_numbers(repository: Repository):
    found = listed(repository)
    states = {name: record["state"] for name, record in found.items()}
    assert states == {
        "workspace": "workspace",
        "main": "branch",
        "middling": "Success",
        "broken": "Failed",
        "waiting": "Queued",
    }
    assert {name: record["change"] for name, record in found.items()} == {
        "workspace": {},
        "main": {},
        "middling": {"method": "magnitude"},
        "broken": {"pattern": "1:4"},
        "waiting": {"sparsity": 0.3},
    }
    own = {name for name, record in found.items() if record["perplexity"] is not None}
    assert own == {"workspace", "main", "middling"}
    assert own == {name for name, record in found.items() if record["accuracy"] is not None}
    assert found["middling"]["perplexity"] != found["main"]["perplexity"] == found["workspace"]["perplexity"]
    shown = json.loads(repository.run("dvc", "exp", "show", "--json", "--all-commits"))
    theirs = [one for state in shown for one in state["experiments"] or [] if one["name"] == "broken"]
    assert theirs[0]["revs"][0]["data"]["metrics"]["metrics/pruned/perplexity.json"]["data"]  # the branch's


def test_an_edit_takes_the_workspaces_numbers_away(repository: Repository):
    path = repository.root / "params.yaml"
    before = path.read_text(encoding="utf-8")
    try:
        path.write_text(before.replace("sparsity: 0.5", "sparsity: 0.9"), encoding="utf-8")
        assert listed(repository)["workspace"] == {
            "state": "workspace",
            "change": {"sparsity": 0.9},
            "perplexity": None,
            "accuracy": None,
            "stale": True,
        }
        said = experiments(project=Project(repository.root))
    finally:
        path.write_text(before, encoding="utf-8")
    assert "Without numbers where stages have not run on the settings at hand: workspace." in said
    assert "sparsity=0.9" in said


def test_the_command_prints_a_row_an_experiment(repository: Repository):
    said = repository.run("wanda-dvc", "list")
    for name in ("workspace", "main", "middling", "broken", "waiting"):
        assert f"| {name} " in said
