"""How a stage starts: what it imports, and the tasks that are answered ahead of their own runs."""

import json
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from command_line import wanda_dvc
from conftest import write_params
from lm_eval.tasks._index import TaskIndex

from wanda_dvc.stages import STAGES, ahead, run
from wanda_dvc.study import places
from wanda_dvc.study.files import Json, load_json
from wanda_dvc.study.project import ITEMS, Project

pytestmark = pytest.mark.slow  # stages as processes, with real imports
HEAVY = {
    "accelerate", "datasets", "dvc", "lm_eval", "matplotlib", "numpy", "pandas", "pyarrow", "scipy", "torch",
    "transformers",
}  # fmt: skip
TORCH = {"numpy", "torch"}
MODELS = TORCH | {"accelerate", "scipy", "transformers"}  # transformers brings the others
QUESTIONS = {"datasets", "lm_eval", "numpy", "pandas", "pyarrow"}
# Of those, what each run may import, in an order in which a process may have imported what the later ones need.
MAY_IMPORT = {
    "locate": set[str](),
    "download calibration": set[str](),
    "download perplexity": set[str](),
    "download tasks": QUESTIONS,
    "mask": TORCH,
    "apply": TORCH,
    "download model": MODELS,
    "calibrate": MODELS,
    "perplexity dense": MODELS,
    "perplexity pruned": MODELS,
    "zero-shot dense piqa": MODELS | QUESTIONS,
    "zero-shot pruned piqa": MODELS | QUESTIONS,
}
BEFORE = {  # imported once for a run and those after it
    "mask": "torch",
    "download model": "wanda_dvc.engine.decoder",
    "zero-shot dense piqa": "wanda_dvc.engine.harness",
}
RUNS = """
import importlib, json, os, sys
for words, module in json.loads(sys.argv[1]):
    if module:
        importlib.import_module(module)
    if not os.fork():
        from wanda_dvc.cli import app
        app(words.split(), standalone_mode=False)
        print(json.dumps([words, sorted({name.partition(".")[0] for name in sys.modules})]), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, tiny: Path, texts: dict[str, str]) -> Project:
    """A study of two tasks that is ready to be asked."""
    root = tmp_path_factory.mktemp("starts")
    write_params(root, tiny, **texts, tasks__names=["piqa", "rte"])
    project = Project(root)
    for part in STAGES["download"].parts:
        run("download", project=project, part=part)
    for name in ("calibrate", "mask", "apply"):
        run(name, project=project)
    return project


@pytest.fixture
def asked(study: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A copy of it, in which stages run as DVC runs them."""
    shutil.copytree(study.root, tmp_path / "study")
    monkeypatch.setenv("DVC_STAGE", "zero-shot@dense-piqa")
    return Project(tmp_path / "study")


def test_no_run_imports_more_than_it_needs(study: Project, tmp_path: Path):
    every = [name.replace("-", " ") for row in STAGES.values() for name, _, _ in row.runs(["piqa"])]
    assert sorted(words.replace("-", " ") for words in MAY_IMPORT) == sorted(every)
    shutil.copytree(study.root, tmp_path / "study")
    runs = json.dumps([(words, BEFORE.get(words)) for words in MAY_IMPORT])
    done = subprocess.run(
        [sys.executable, "-c", RUNS, runs], cwd=tmp_path / "study", capture_output=True, text=True, check=True
    )
    imported = dict(json.loads(line) for line in done.stdout.splitlines())
    assert imported.keys() == MAY_IMPORT.keys(), done.stderr
    more = {words: sorted(HEAVY & set(modules) - MAY_IMPORT[words]) for words, modules in imported.items()}
    assert {words: names for words, names in more.items() if names} == {}


def ask(project: Project, task: str) -> None:
    done = wanda_dvc("zero-shot", "dense", task, cwd=project.root)
    assert done.returncode == 0, done.stderr


def written(project: Project, task: str) -> tuple[Json, Json]:
    return load_json(project.details("dense", f"zero_shot/{task}")), load_json(
        project.metrics("dense", f"zero_shot/{task}")
    )


def waiting(project: Project) -> list[Path]:
    return sorted(project.work_root.glob(f"*/{ahead.ANSWERED}"))


def test_a_task_answered_ahead_has_the_results_and_the_time_of_its_own_run(
    asked: Project, monkeypatch: pytest.MonkeyPatch
):
    ask(asked, "piqa")
    assert not any(written(asked, "rte"))
    (answered,) = waiting(asked)
    seconds = load_json(answered)["times"]["seconds"]
    with monkeypatch.context() as patch:
        patch.setattr(ahead, "answer", None)  # nothing is asked again
        ask(asked, "rte")
    assert not waiting(asked)
    found = written(asked, "rte")
    key = STAGES["zero-shot"].key(asked, "dense", "rte")
    assert asked.times.read("zero-shot-dense-rte", key or "")["seconds"] == seconds > 0
    monkeypatch.delenv("DVC_STAGE")
    ask(asked, "rte")
    assert written(asked, "rte") == found


@pytest.mark.parametrize("why", ["by hand", "no time", "there already", "at work", "damaged"])
def test_nothing_is_answered_ahead(asked: Project, monkeypatch: pytest.MonkeyPatch, why: str):
    """... where nobody may ask for it, where it takes long, or where it can't be; the run's own task is unharmed."""
    monkeypatch.delenv("DVC_STAGE")
    ask(asked, "rte")
    expected = written(asked, "rte")
    protocol = expected[0]["protocol"]
    assert not waiting(asked)
    if why != "there already":
        asked.details("dense", "zero_shot/rte").unlink()
    if why != "by hand":
        monkeypatch.setenv("DVC_STAGE", "zero-shot@dense-piqa")
    if why == "no time":
        monkeypatch.setattr(ahead, "SECONDS", 0.01)
    if why == "damaged":
        (asked.data("tasks") / "rte" / ITEMS).write_bytes(b"\xff")
    with asked.work(protocol) if why == "at work" else nullcontext():
        ask(asked, "piqa")
    assert all(written(asked, "piqa"))
    assert not waiting(asked)
    if why != "damaged":
        ask(asked, "rte")
        assert written(asked, "rte") == expected


def test_an_answer_ahead_counts_for_what_it_was_asked_with_alone(asked: Project):
    ask(asked, "piqa")
    (answered,) = waiting(asked)
    params = (asked.root / "params.yaml").read_text(encoding="utf-8")
    assert "limit: 4" in params
    (asked.root / "params.yaml").write_text(params.replace("limit: 4", "limit: 3"), encoding="utf-8")
    ask(asked, "rte")
    assert len(written(asked, "rte")[0]["items"]) == 3
    assert answered in waiting(asked)


def test_a_task_is_found_in_the_file_that_the_whole_index_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = {
        "a/group.yaml": "group: pair\ntask: [one, two]\n",
        "a/one.yaml": "task: one\ninclude: base\ntag: few\n",
        "a/base": "output_type: multiple_choice\n",
        "b/again.yaml": "task: one\n",
        "b/few.yaml": "task: few\n",
        "b/one_more.yaml": "task: 'one.more'\ndescription: one, two\n",
        "b/torn.yaml": "task: two\n- {",
        "c/two.yaml": "task: two\nprocess_docs: !function no_module.f\ntag: pair\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr("lm_eval.tasks.__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr("wanda_dvc.study.places._task_files", places._task_files.__wrapped__)
    whole = TaskIndex.build([tmp_path])
    for name in ("one", "two", "few", "pair", "one.more", "none", "multiple_choice"):
        path = whole[name].yaml_path if name in whole else None
        found = places.task_definition(name)
        assert (found and found[0]) == (path and path.relative_to(tmp_path).as_posix()), name
