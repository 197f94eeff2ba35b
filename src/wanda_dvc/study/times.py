"""How long runs took, and on what machine: a file a run, in DVC's temporary folder of the repository.

They are no outputs of the pipeline. As outputs, times decided what runs: a clone without the cache asked for times that
nobody else had, and two branches conflicted in dvc.lock over seconds. A run's key follows from what it made, so that
experiments of any checkout find the times of their own runs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wanda_dvc.study.files import Json, load_json, write_json
from wanda_dvc.study.provenance import PROVENANCE, digest

if TYPE_CHECKING:
    from wanda_dvc.study.project import Project


@dataclass(frozen=True)
class Times:
    """The times of all runs in one repository."""

    folder: Path

    def _path(self, run: str, key: str) -> Path:
        return self.folder / f"{run}-{key[:32]}.json"

    def write(self, run: str, key: str, content: Json) -> None:
        """Keep a run's seconds, memory, machine and device."""
        write_json(self._path(run, key), content)

    def of(self, study: "Project") -> dict[str, Json]:
        """Return the times of the runs that made a study's results, by run, each with its `key`."""
        found = {}
        for run, key in keys(study).items():
            if content := load_json(self._path(run, key)):
                found[run] = content | {"key": key}
        return found


def keys(study: "Project") -> dict[str, str]:
    """Return the key of each run whose results a study holds, in the order of the pipeline.

    A download's key is the hash of the content, any other run's that of its result's provenance.
    """
    stats, masks = load_json(study.stats / PROVENANCE), load_json(study.masks / PROVENANCE)
    found: dict[str, str] = {}
    later: dict[str, str] = {}
    tasks: dict[str, str] = {}
    for model in ("dense", "pruned"):
        details = study.details(model, "perplexity").parent
        if protocol := load_json(details / "perplexity.json").get("protocol"):
            later[f"perplexity-{model}"] = digest(protocol)
            found["download-perplexity"] = protocol["text"]["sha256"]
        for task in study.params.tasks.names:
            if protocol := load_json(details / "zero_shot" / f"{task}.json").get("protocol"):
                later[f"zero-shot-{model}-{task}"] = digest(protocol)
                tasks[task] = protocol["task"]["sha256"]
    if tasks:
        found["download-tasks"] = digest(tasks)
    if source := stats or masks:
        found["download-model"] = source["model"]["sha256"]
        found["download-calibration"] = (stats.get("text") or masks["calibration"]["text"])["sha256"]
    made = {"calibrate": digest(stats)} if stats else {}
    if masks:
        made |= {"mask": digest(masks), "apply": digest(masks)}
    order = ("download-model", "download-calibration", "download-perplexity", "download-tasks")
    return {run: found[run] for run in order if run in found} | made | later
