"""How a stage starts: what it imports, and how it finds a task."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_params
from lm_eval.tasks._index import TaskIndex

from wanda_dvc.sources import tasks
from wanda_dvc.stages import STAGES, run
from wanda_dvc.study.project import Project

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
    "plan": set[str](),
    "download calibration": set[str](),
    "download perplexity": set[str](),
    "download tasks": QUESTIONS,
    "mask": TORCH,
    "apply": TORCH,
    "download model": MODELS,
    "calibrate norms": MODELS,
    "calibrate gram": MODELS,
    "calibrate gradients": MODELS,
    "perplexity dense": MODELS,
    "perplexity pruned": MODELS,
    "zero-shot dense": MODELS | QUESTIONS,
    "zero-shot pruned": MODELS | QUESTIONS,
}
BEFORE = {  # imported once for a run and those after it
    "mask": "torch",
    "download model": "wanda_dvc.engine.decoder",
    "zero-shot dense": "wanda_dvc.engine.harness",
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
    """A study that is ready to be evaluated."""
    root = tmp_path_factory.mktemp("starts")
    write_params(root, tiny, **texts)
    project = Project(root)
    for part in STAGES["download"].parts:
        run("download", project=project, part=part)
    for name in ("calibrate", "mask", "apply"):
        run(name, project=project)
    return project


def test_no_run_imports_more_than_it_needs(study: Project, tmp_path: Path):
    every = [name.partition("@")[0].replace("-", " ") for row in STAGES.values() for name, *_ in row.runs(["embedded"])]
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
    monkeypatch.setattr("wanda_dvc.sources.tasks._task_files", tasks._task_files.__wrapped__)
    index = TaskIndex.build([tmp_path])
    for name in ("one", "two", "few", "pair", "one.more", "none", "multiple_choice"):
        path = index[name].yaml_path if name in index else None
        found = tasks.task_definition(name)
        assert (found and found[0]) == (path and path.relative_to(tmp_path).as_posix()), name
