"""DVC's private names that study/dvc.py uses, and what it reads of a repository."""

import subprocess
from pathlib import Path

from conftest import Patch
from dvc.repo import Repo

from wanda_dvc.study.dvc import states


def test_commits_without_experiments_are_not_read(tmp_path: Path, monkeypatch: Patch):
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
