"""The sources shared by `dvc push`: model, texts and tasks, by their `cache` in `dvc.yaml`."""

import os
import shutil
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from wanda_dvc.errors import UserError
from wanda_dvc.reading import read_text
from wanda_dvc.study.files import link_file
from wanda_dvc.study.local import local_sources
from wanda_dvc.study.project import Project
from wanda_dvc.study.ran import read_lock, settings_of
from wanda_dvc.study.settings import flatten


def _stage(part: str) -> tuple[str, str]:
    """Return DVC's name of the stage that fetches a part or a text, `perplexity/NAME`, and the instance."""
    kind, _, text = part.partition("/")
    return (f"download-{kind}", text) if text else ("download", kind)


def cached(project: Project, part: str = "model") -> bool | None:
    """Return `cache` of a part's source in `dvc.yaml`; None if it is missing: DVC then caches it.

    DVC pushes and pulls only cached files.
    """
    path = project.root / "dvc.yaml"
    if not path.is_file():
        return None
    try:
        stages = YAML(typ="safe", pure=True).load(read_text(path, "restore it from git"))["stages"]
        (out,) = stages[_stage(part)[0]]["do"]["outs"]
        options = next(iter(out.values())) if isinstance(out, dict) else {}
        found = options.get("cache") if options.get("push", True) else False
    except (YAMLError, KeyError, TypeError, ValueError, AttributeError, StopIteration):
        return None  # `doctor` reports the problem
    return found if isinstance(found, bool) else None


def check_gated(project: Project, part: str, gated: tuple[str, ...]) -> None:
    """Raise UserError if a gated source would be shared without an explicit `cache: true` in `dvc.yaml`."""
    if gated and (project.root / "dvc.yaml").is_file() and cached(project, part) is None:
        stage, instance = _stage(part)
        out = "data/perplexity/${key}" if "/" in part else "${item.out}"
        raise UserError(
            f"dvc.yaml: {stage}: {instance}: {', '.join(gated)} is gated or private, and `dvc push` would share it, "
            f"expected a choice; write `- {out}: {{ cache: false }}` under `outs` to keep it on this machine, or "
            "`{ cache: true }` where its licence lets you share it"
        )


def take_from_the_study(project: Project, part: str, target: Path) -> bool:
    """Link an uncached source into a queued experiment's checkout, from the study that queued it.

    Return False if the study's source is from other settings, or differs from its dvc.lock. The study has resolved its
    Hub branch to a commit, so the branch is not resolved again.
    """
    root = os.environ.get("DVC_ROOT")
    if not root or Path(root).resolve() == project.repository.resolve() or cached(project, part) is not False:
        return False
    study = Project(Path(root) / project.root.absolute().relative_to(project.repository))
    stage = "@".join(_stage(part))
    made = settings_of(read_lock(study.root).get(stage, {}))
    asked = dict(flatten(project.params.model_dump(mode="json")))
    if not made or not made.items() <= asked.items() or part in local_sources(project.params):
        return False
    source = study.root / target.relative_to(project.root)
    if not source.is_dir() or not _as_locked(study, stage):
        return False
    shutil.copytree(source, target, copy_function=lambda here, there: link_file(Path(here), Path(there)))
    return True


def _as_locked(study: Project, stage: str) -> bool:
    """Whether a study's files match its dvc.lock for a stage.

    `git checkout` and `dvc exp apply` change the lock, but not an uncached source.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(study.root)) as repo:  # DVC hashes a file again only when it has changed
            (out,) = repo.stage.load_one(str(study.root / "dvc.yaml"), stage).outs
            return not out.changed_checksum()
    except DvcException:
        return False
