"""`dvc.lock`: the settings of each stage's last run, and DVC's digests of the files that it read and wrote.

`params.yaml` has the requested settings. Between an edit and the next `dvc repro`, no result has these settings.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path, PurePath
from typing import Any

from wanda_dvc.params import Params, check_params, parse_yaml, resolved
from wanda_dvc.study.files import Json, json_text

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
        return cls(content.get("stages") or {})

    @property
    def settings(self) -> Json:
        """The settings of the stage `plan`'s last run, nested; {} before the first."""
        return (self.stages.get("plan", {}).get("params") or {}).get("params.yaml") or {}

    def params(self, requested: Params) -> Params:
        """Return the settings of the current results, else the requested. UserError if this version cannot run them."""
        runtime = {"runtime": requested.runtime.model_dump(mode="json")}
        return check_params(self.settings | runtime) if self.settings else requested

    def not_run(self, requested: Params) -> dict[str, Any]:
        """Return the requested settings that differ from the current results'; `runtime` and texts' order never do."""
        ran, wanted = resolved(self.params(requested)), resolved(requested)
        return {key: wanted.get(key) for key in ran | wanted if ran.get(key) != wanted.get(key)}

    @cached_property
    def writers(self) -> dict[str, str]:
        """The stage that writes each output, by path."""
        return {out["path"]: name for name, stage in self.stages.items() for out in stage.get("outs", [])}

    @cached_property
    def digests(self) -> dict[str, str | None]:
        """The MD5 of each output, by path."""
        return {out["path"]: out.get("md5") for stage in self.stages.values() for out in stage.get("outs", [])}

    def stale(self, plan: Mapping[str, Json]) -> list[str]:
        """Return the stages with an input that is not the current output of the stage that writes it.

        `plan` has the content of the current files in `plan/`, by path without `.json`. A stage after a stale stage is
        stale.
        """
        current = dict(self.digests)
        for name, content in plan.items():
            current[f"plan/{name}.json"] = md5(f"{json_text(content)}\n".encode())

        @cache
        def is_stale(stage: str) -> bool:
            for dep in self.stages[stage].get("deps", []):
                path, digest_when_read = dep["path"], dep.get("md5")
                if current.get(path, digest_when_read) != digest_when_read:
                    return True
                places = (path, *map(str, PurePath(path).parents))  # the input, or a folder around it, is an output
                if any(is_stale(self.writers[place]) for place in places if place in self.writers):
                    return True
            return False

        return list(filter(is_stale, self.stages))


def md5(content: bytes) -> str:
    """Return a file's MD5, as `dvc.lock` has it."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
