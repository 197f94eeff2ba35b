"""The last runs, by `dvc.lock`: the settings behind the current results, and the stale stages.

`params.yaml` has the requested settings. Between an edit and the next `dvc repro`, no result has these settings.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanda_dvc.errors import UserError
from wanda_dvc.params import CalibrationText, Params, Text, parse_yaml
from wanda_dvc.reading import is_there, name_of
from wanda_dvc.study.files import Json
from wanda_dvc.study.project import Project
from wanda_dvc.study.provenance import PROVENANCE, read_provenance
from wanda_dvc.study.settings import Settings, flatten, nested, resolved

LOCK = "dvc.lock"
TEXTS, CALIBRATION_TEXT = "perplexity.texts.", "calibration.text."
BY_TEXT = ("download-perplexity", "perplexity-dense", "perplexity-pruned")  # stages that run once for each text


@dataclass(frozen=True)
class Ran:
    """The last runs of a study's stages."""

    stages: Json  # of dvc.lock, by DVC's name; {} before the first run
    params: Params  # of the current results; for a stage without a run, of params.yaml
    asked: Params  # of params.yaml

    @classmethod
    def of(cls, project: Project) -> "Ran":
        """Read the last runs. Masks and weights made without DVC record their settings, which override the lock's."""
        stages = read_lock(project.root)
        asked = dict(flatten(project.params.model_dump(mode="json")))
        there = [stages[name] for name in without_removed_texts(stages, project.params)]
        ran = {key: value for stage in there for key, value in settings_of(stage).items() if key in asked}
        masks = read_provenance(project.masks, "mask") if is_there(project.masks / PROVENANCE) else Json()
        made = masks.get("params", {}) | {f"calibration.{key}": x for key, x in masks.get("calibration", {}).items()}
        made = {key: value for key, value in made.items() if key in asked}
        params: Params = _changed(project.params, nested(ran))
        flat = resolved(params)
        if any(flat[key] != value for key, value in made.items()):  # equal choices may have different spellings
            params = _changed(params, nested(made))
        return cls(stages, params, project.params)

    @property
    def unmet(self) -> dict[str, Any]:
        """Return the settings of params.yaml that differ from the current results'; `runtime` never counts."""
        ran, asked = resolved(self.params), resolved(self.asked)
        measured = {text for stage in self.stages for name, _, text in [stage.partition("@")] if name == BY_TEXT[-1]}
        new = {f"{TEXTS}{text}.source" for text in self.asked.perplexity.texts if text not in measured}
        return {key: value for key, value in asked.items() if ran[key] != value or (measured and key in new)}

    @property
    def stale(self) -> list[str]:
        """Return the stages with results for other settings than `params.yaml`'s, in the lock's order."""
        stale = stale_stages(self.stages, dict(flatten(self.asked.model_dump(mode="json"))))
        return without_removed_texts(stale, self.asked)

    @property
    def outdated(self) -> list[str]:
        """Return the stages with inputs that changed after the run, for any `params.yaml`."""
        return without_removed_texts(stale_stages(self.stages, {}), self.asked)


def md5(path: Path) -> str | None:
    """Return a file's MD5, as `dvc.lock` has it; None if it is missing."""
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() if path.is_file() else None


def read_lock(root: Path) -> Json:
    """Return the stages of a study's `dvc.lock`; {} without a lock."""
    path = root / LOCK
    return load_lock(path.read_text(encoding="utf-8")) if path.is_file() else {}


def load_lock(text: str) -> Json:
    """Return the stages in the text of a `dvc.lock`. UserError if it is not a valid lock, as after a merge."""
    todo = "expected what DVC writes; resolve the conflict of a merge, or restore the file from git"
    content = parse_yaml(text, LOCK, todo) or {}
    if isinstance(content, dict) and isinstance(stages := content.get("stages") or {}, dict):
        return stages
    raise UserError(f"{LOCK}: got {name_of(content)}, {todo}")


def stale_stages(stages: Json, asked: Mapping[str, Any]) -> list[str]:
    """Return the stages that ran on other settings than `asked`, or on inputs that changed later.

    Settings are by dotted name; a setting missing in `asked` makes no stage stale. `locate` makes no other stage stale
    by its settings: it reads the settings of all texts, and each `download` has its own.
    """
    asked = _complete(asked)
    made = {out["path"]: (name, out.get("md5")) for name, stage in stages.items() for out in stage.get("outs", [])}
    stale = {
        name
        for name, stage in stages.items()
        if any(key in asked and asked[key] != value for key, value in settings_of(stage).items())
    }

    def waits(stage: Json) -> bool:
        """Whether an input of a stage is stale, or changed after the run."""
        for dep in stage.get("deps", []):
            path, output = dep["path"], made.get(dep["path"])
            maker = next((name for out, (name, _) in made.items() if path == out or path.startswith(f"{out}/")), None)
            if (maker in stale and maker != "locate") or (output and output[1] != dep.get("md5")):
                return True
        return False

    while new := {name for name, stage in stages.items() if name not in stale and waits(stage)}:
        stale |= new  # the lock has any order
    return [name for name in stages if name in stale]


def without_removed_texts(stages: Iterable[str], asked: Params) -> list[str]:
    """Return the stages that `asked` has: DVC keeps the stages of removed texts in the lock."""
    parts = [(name, *name.partition("@")) for name in stages]
    return [name for name, stage, _, text in parts if stage not in BY_TEXT or text in asked.perplexity.texts]


def settings_of(stage: Json) -> dict[str, Any]:
    """Return the settings of a stage's last run, by dotted name."""
    listed = (stage.get("params") or {}).get("params.yaml") or {}
    sections = {key: value for key, value in listed.items() if isinstance(value, dict)}
    # A stage that lists a setting alone, such as `calibration.text.source`, reads no other of its section.
    return dict(flatten(listed)) | _complete(dict(flatten(sections)))


def _changed(section: Any, changes: Settings) -> Any:
    """Return settings with changes, nested; unchecked, because a named method may no longer be installed."""
    if isinstance(section, dict):  # the texts
        return section | {name: _changed(section[name], value) for name, value in changes.items()}
    update = {
        name: _changed(getattr(section, name), value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return section.model_copy(update=update)


def _complete(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with the nulls of each text, which params.yaml need not have."""
    texts = {key.rpartition(".")[0] for key in asked if key.startswith((TEXTS, CALIBRATION_TEXT))}
    kinds = {text: Text if text.startswith(TEXTS) else CalibrationText for text in sorted(texts)}
    return {f"{text}.{field}": None for text, kind in kinds.items() for field in kind.model_fields} | dict(asked)
