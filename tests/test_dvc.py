"""DVC's private names that study/dvc.py uses, and what it reads of a repository."""

import ast
import inspect
import subprocess
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT
from dvc.api import DVCFileSystem
from dvc.repo import Repo
from dvc.repo.experiments import Experiments
from dvc.repo.experiments.queue.celery import LocalCeleryQueue
from dvc.repo.experiments.queue.tempdir import TempDirQueue
from dvc.scm import Git

from wanda_dvc.study.dvc import states

SOURCE = ROOT / "src/wanda_dvc/study/dvc.py"


def test_every_name_that_is_imported_from_dvc_is_there():
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and str(node.module).startswith("dvc")]
    assert len(found) > 10
    for node in found:
        module = import_module(str(node.module))
        assert [name.name for name in node.names if not hasattr(module, name.name)] == []


def test_the_methods_that_are_called_take_these_words():
    assert inspect.signature(Repo.init).parameters.keys() >= {"root_dir", "subdir"}
    assert inspect.signature(Experiments.show).parameters
    shown = inspect.signature(import_module("dvc.repo.experiments.show").show).parameters
    assert shown.keys() >= {"revs", "all_branches", "all_tags"}
    for queue, names in (
        (LocalCeleryQueue, ("iter_queued", "iter_active", "iter_failed")),
        (TempDirQueue, ["iter_active"]),
    ):
        assert all(hasattr(queue, name) for name in names)
    assert all(hasattr(Experiments, name) for name in ("celery_queue", "tempdir_queue"))
    assert all(hasattr(Git, name) for name in ("get_fs", "root_dir"))
    assert all(hasattr(DVCFileSystem, name) for name in ("find", "info", "get_file", "repo"))
    assert all(hasattr(Repo, name) for name in ("get_rev", "fs", "config"))


def test_commits_without_experiments_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`list` and `report` read every commit of the repository: minutes in a large one."""
    for name in ("GIT_AUTHOR", "GIT_COMMITTER"):
        monkeypatch.setenv(f"{name}_NAME", "test")
        monkeypatch.setenv(f"{name}_EMAIL", "test@example.org")

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "--quiet")
    Repo.init(str(tmp_path)).close()
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    revs = []
    for number in range(4):
        (tmp_path / "params.yaml").write_text(f"sparsity: 0.{number}\n")
        git("add", ".")
        git("commit", "--quiet", "--message", f"{number}")
        revs.append(git("rev-parse", "HEAD"))
        if number == 1:
            (tmp_path / "params.yaml").write_text("sparsity: 0.9\n")
            with Repo(str(tmp_path)) as repo:
                repo.experiments.save(name="an-experiment")
            git("checkout", "--", ".")
    with Repo(str(tmp_path)) as repo:
        found = states(tmp_path, repo)
    assert {state.rev for state in found} == {"workspace", revs[3], revs[1]}
    assert [one.name for state in found for one in state.experiments or []] == ["an-experiment"]
