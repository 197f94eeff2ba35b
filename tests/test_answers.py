"""Zero-shot: one run a model, in which no task is asked twice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cases.grids import thinned
from conftest import write_params

from wanda_dvc.stages import run, zero_shot
from wanda_dvc.study.files import Json, load_json, write_json
from wanda_dvc.study.project import Project, Work
from wanda_dvc.study.provenance import write_provenance

TASKS = ["piqa", "rte", "arc_easy"]


class Killed(BaseException):
    """A kill while a task is asked."""


@pytest.fixture
def study(tmp_path: Path, tiny: Path) -> Project:
    """A study of three tasks, whose dense model has not been asked yet."""
    write_params(tmp_path, tiny, tasks__names=TASKS)
    project = Project(tmp_path)
    for part in ("model", "tasks"):
        run("download", project=project, part=part)
    return project


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tasks that the model was asked; a task that is in the list as `not TASK` ends the run."""
    asked: list[str] = []
    ask = zero_shot._ask

    def spy(project: Project, model: str, task: str, protocol: Json, work: Work) -> Json:
        if f"not {task}" in asked:
            raise Killed
        asked.append(task)
        return ask(project, model, task, protocol, work)

    monkeypatch.setattr(zero_shot, "_ask", spy)
    return asked


def results(project: Project, tasks: list[str]) -> dict[str, bytes]:
    """What a run for these tasks publishes."""
    write_params(project.root, project.params.model, tasks__names=tasks)
    run("zero-shot", project=Project(project.root), part="dense")
    metrics, details = project.metrics("dense", "zero_shot"), project.details("dense", "zero_shot")
    assert list(load_json(metrics)) == list(load_json(details)["tasks"]) == tasks
    return {path.name: path.read_bytes() for path in (metrics, details, project.plots("dense/zero_shot"))}


def test_an_added_task_is_asked_alone_and_all_results_are_those_of_one_run(study: Project, asked: list[str]):
    full = results(study, TASKS)
    for path in study.answers.iterdir():
        path.unlink()
    asked.clear()
    before = results(study, TASKS[:2])
    assert results(study, TASKS) == full
    assert asked == TASKS
    assert results(study, TASKS[:2]) == before
    assert asked == TASKS
    assert not [path for path in study.work_root.iterdir() if path.is_dir()]


def test_a_killed_run_goes_on_from_the_tasks_that_it_finished(study: Project, asked: list[str]):
    asked.append("not rte")
    with pytest.raises(Killed):
        results(study, TASKS)
    assert asked == ["not rte", "piqa"]
    assert not study.metrics("dense", "zero_shot").exists()
    asked.clear()
    results(study, TASKS)
    assert asked == ["rte", "arc_easy"]


@pytest.mark.parametrize("damage", thinned(['{"details": {"protocol": {}}}', "", "[]", "{}"], 4))
def test_answers_that_are_damaged_or_of_another_run_are_asked_again(study: Project, asked: list[str], damage: str):
    before = results(study, ["piqa"])
    (kept,) = study.answers.glob("*-piqa-*")
    kept.write_text(damage, encoding="utf-8")
    assert results(study, ["piqa"]) == before
    assert asked == ["piqa", "piqa"]


CHANGED = [{"model": "another"}, {"dense": "another"}, {"dtype": "float64"}, {"limit": 3}, {"examples": 5}]
CHANGED += [{"libraries": {"torch": "1.0"}}, {"libraries": {"lm_eval": "0.1"}}, {"task": {"sha256": "another"}}]


@pytest.fixture
def answered(project: Callable[..., Project]) -> Callable[..., tuple[Project, Json]]:
    """Makes a study with the dense model's answers, whose protocol has some changes; returns the pruned model's too."""

    def make(samples: bool = False, **changes: Any) -> tuple[Project, Json]:
        made, words = project(), dict.fromkeys(("task", "source", "role", "sha256", "lm_eval", "definition"), "x")
        write_provenance(made.data("tasks") / "piqa", {"made_by": "download tasks", "samples": samples, **words})
        protocol = {"model": "x", "dense": "x", "task": {"sha256": "x"}, "dtype": "float32", "limit": 5, "examples": 0}

        def details(*answers: int, **changes: Any) -> Json:
            items = [{"item": i, "answer": one, "acc": float(one == 0)} for i, one in enumerate(answers)]
            return {"piqa": {"protocol": protocol | changes, "items": items}}

        write_json(made.details("dense", "zero_shot"), {"tasks": details(0, 0, 0, 1, 1, **changes)})
        return made, details(0, 1, 1, 0, 2)

    return make


@pytest.mark.parametrize("samples", [True, False])
def test_changed_answers_are_metrics_of_real_tasks(samples: bool, answered: Callable[..., tuple[Project, Json]]):
    """`dvc metrics diff` shows them; the embedded questions are no benchmark."""
    counts = {"piqa": {"flips": {"acc": {"lost": 2, "gained": 1, "swapped": 1}}}}
    assert zero_shot._flips(*answered(samples)) == ({} if samples else counts)


@pytest.mark.parametrize("change", CHANGED, ids=str)
def test_answers_to_something_else_are_not_compared(
    change: Json, answered: Callable[..., tuple[Project, Json]], capsys: pytest.CaptureFixture[str]
):
    """Another dense model, dtype, limit, item or version of a library; every dense model is another than the pruned."""
    (key,) = change
    found = zero_shot._flips(*answered(**change))
    assert bool(found) is (key == "model")
    said = f"piqa: not compared with the dense model's answers, which are of another {key}; run `dvc repro --force"
    assert (said in capsys.readouterr().err) is (key != "model")
