"""The last runs of a study's stages, as `dvc.lock` has them: their settings, and which results are theirs.

`params.yaml` has the requested settings. Between an edit and the next `dvc repro`, no result has these settings.
"""

import contextlib
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from wanda_dvc.errors import UserError
from wanda_dvc.params import Params, check_params, nested, parse_yaml, resolved
from wanda_dvc.reading import name_of
from wanda_dvc.stages import STAGES, stage_inputs
from wanda_dvc.study.dvc import repro
from wanda_dvc.study.files import Json, json_text
from wanda_dvc.study.folder import Study

LOCK = "dvc.lock"


@dataclass(frozen=True)
class Lock:
    """The stages of a `dvc.lock`, by DVC's name; none before the first run."""

    stages: Json

    @classmethod
    def read(cls, root: Path) -> "Lock":
        """Read the lock of a study. UserError if it is not valid, as after a merge with conflicts."""
        path = root / LOCK
        return cls.parse(path.read_text(encoding="utf-8")) if path.is_file() else cls({})

    @classmethod
    def parse(cls, text: str) -> "Lock":
        """Read the text of a lock."""
        todo = "expected what DVC writes; resolve the conflict of a merge, or restore the file from git"
        content = parse_yaml(text, LOCK, todo) or {}
        if isinstance(content, dict) and isinstance(stages := content.get("stages") or {}, dict):
            return cls(stages)
        raise UserError(f"{LOCK}: got {name_of(content)}, {todo}")

    def outs(self, stages: Iterable[str]) -> dict[str, str | None]:
        """Return the MD5 of each output of some stages, by path."""
        return {out["path"]: out.get("md5") for name in stages for out in self.stages[name].get("outs", [])}

    def stale(self, asked: Mapping[str, Any] | None = None) -> list[str]:
        """Return the stages with an input that is not the current output of the stage that makes it.

        A plan other than that of `asked` counts too: settings by dotted name, by default those of the last run.
        """
        now = self.outs(self.stages)
        with contextlib.suppress(UserError):  # settings of another version
            for name, content in stage_inputs(check_params(nested(asked) if asked else self.settings)).items():
                now[f"plan/{name}.json"] = md5(f"{json_text(content)}\n".encode())
        stale: set[str] = set()
        while True:  # the lock has any order
            outs = self.outs(stale)
            found = {
                name
                for name, stage in self.stages.items()
                for path, was in ((dep["path"], dep.get("md5")) for dep in stage.get("deps", []))
                if now.get(path, was) != was or any(PurePath(path).is_relative_to(out) for out in outs)
            }
            if found == stale:
                return [name for name in self.stages if name in stale]
            stale = found

    @property
    def settings(self) -> Json:
        """The settings of the stage `plan`'s last run; {} before the first."""
        return (self.stages.get("plan", {}).get("params") or {}).get("params.yaml") or {}

    def params(self, asked: Params) -> Params:
        """Return the settings of the current results, else the requested. UserError if this version cannot run them."""
        runtime = {"runtime": asked.runtime.model_dump(mode="json")}
        return check_params(self.settings | runtime) if self.settings else asked

    def unmet(self, asked: Params) -> dict[str, Any]:
        """Return the requested settings that differ from the current results'; `runtime` and texts' order never do."""
        ran, wanted = resolved(self.params(asked)), resolved(asked)
        return {key: wanted.get(key) for key in ran | wanted if ran.get(key) != wanted.get(key)}

    def others(self, root: Path) -> set[str]:
        """Return the files below metrics/ that are no results of the current runs, by path below the study.

        Such are the files of stale stages, and after `git checkout` without `dvc checkout` those of another commit.
        """
        if not self.stages:
            return set()  # stages that ran without DVC
        current = self.outs(self.stages.keys() - self.stale())
        paths = {path.relative_to(root).as_posix(): path for path in (root / "metrics").rglob("*") if path.is_file()}
        return {name for name, path in paths.items() if current.get(name) != md5(path.read_bytes())}


def md5(content: bytes) -> str:
    """Return a file's MD5, as `dvc.lock` has it."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def reproduce(root: Path, stage: str, part: str = "", text: str = "", *, shown: bool = False) -> None:
    """Run a stage of a study, or one part of it, and those before it, as far as settings or inputs have changed."""
    runs = STAGES[stage].runs(Study(root).params.perplexity.texts, part, text)
    repro(root, [name for name, _, _ in runs], shown=shown)
