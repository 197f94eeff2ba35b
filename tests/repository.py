"""A user's repository, with commands run as the user runs them."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conftest import ROOT, write_settings
from dvc.repo import Repo
from forks import commands

from wanda_dvc.stages import stage_inputs
from wanda_dvc.study.files import write_json
from wanda_dvc.study.folder import Study

# Stages of its pipeline.
DOWNLOADS = {"download-model", "download-calibration", "download-perplexity@embedded", "download-tasks"}
PRUNE = {"mask", "apply"}
EVALUATE = {"perplexity-pruned@embedded", "zero-shot-pruned"}
RECOVER = {"recover", "perplexity-recovered@embedded", "zero-shot-recovered"}
CALIBRATE = {"calibrate-norms", "calibrate-gram", "calibrate-fisher", "calibrate-blocks"}


@dataclass
class Repository:
    """A study in a git and DVC repository of its own. Its commands are forks, unless they are to be `real`."""

    root: Path
    model: Path
    real: bool = False
    settings: Mapping[str, object] = field(default_factory=dict)  # that all of its changes keep, such as short texts
    imported_with: Mapping[str, str] = field(default_factory=dict)  # variables that are set when libraries are imported

    @classmethod
    def new(cls, root: Path, model: Path, *, below: str = ".", **options: Any) -> "Repository":
        """The repository's own pipeline around a tiny model; nothing has run yet. git's root may be `below` it."""
        root.mkdir()
        repository = cls(root, model, **options)
        repository.run("git", "init", "--quiet", "--initial-branch", "main", below)
        repository.run("dvc", "init", "--quiet", "--subdir")
        for name in (".dvc/config", "dvc.yaml", ".gitignore", ".dvcignore"):
            shutil.copyfile(ROOT / name, root / name)
        repository.change()
        return repository

    def run(self, *words: str, check: bool = True) -> str:
        """Run a command, which may not ask and may not take forever; its stdout and stderr."""
        done = subprocess.run(
            words, cwd=self.root, env=command_environment(real=self.real, **self.imported_with), text=True, check=False,
            stdin=subprocess.DEVNULL, capture_output=True, timeout=1800,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def repro(self, *targets: str, trained: bool = False, **changes: object) -> set[str]:
        """Change parameters, reproduce some stages, by default all; the stages whose commands ran."""
        if changes:
            self.change(**changes)
        return ran(self.run("dvc", "repro", *targets), trained=trained)

    def change(self, **changes: object) -> None:
        """Write params.yaml anew: the settings of this repository, and changes."""
        write_settings(self.root, self.model, **{**self.settings, **changes})

    def commit(self) -> None:
        """Commit all that git does not ignore."""
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--allow-empty", "--message", "state")

    def save(self, name: str) -> None:
        """Take outs that were written by hand as those of a run: the commit of `main`, or an experiment.

        Outs that are missing hold nothing; plan/ is that of the settings, or all results would be stale.
        """
        for stage, content in stage_inputs(Study(self.root).params).items():
            write_json(self.root / f"plan/{stage}.json", content)
        with Repo(str(self.root)) as repo:
            for one in (*repo.index.outs, *repo.index.deps):
                path = Path(one.fs_path)
                if not path.exists():
                    file = path if path.suffix else path / "nothing.json"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    empty = "{}" if "metrics" in file.parts else '{"made_by": "download model"}'
                    file.write_text(empty, encoding="utf-8")
        self.run("dvc", "commit", "--force", "--quiet")
        if name == "main":
            self.commit()
        else:
            self.run("dvc", "exp", "save", "--quiet", "--force", "--name", name)

    def cached(self) -> int:
        """Bytes in the cache."""
        return sum(path.stat().st_size for path in (self.root / ".dvc/cache").rglob("*") if path.is_file())


def command_environment(*, real: bool, **imported_with: str) -> dict[str, str]:
    """The environment of a command that a user would run: the real one, or a fork of a process with its imports."""
    first = [] if real else [str(commands(**imported_with))]
    path = os.pathsep.join([*first, str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "DVC_NO_ANALYTICS": "1", "PYTHONWARNINGS": "ignore"}
    environment.pop("DVC_ROOT", None)
    return environment


def ran(output: str, *, trained: bool = False) -> set[str]:
    """The stages whose commands ran, by what `dvc repro` printed; those of a recovery count with a training."""
    return {name for name in re.findall(r"Running stage '([^']+)'", output) if trained or "recover" not in name}
