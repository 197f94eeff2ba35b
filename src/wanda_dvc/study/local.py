"""Sources on this machine: local ones, which DVC watches, and the study's own, for a queued experiment.

`sources/<part>` is a link to the user's directory or file, or a note if the source is not local. DVC follows the link,
and hashes a file again only after its inode, time or size has changed.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from wanda_dvc.errors import UserError
from wanda_dvc.params import Params
from wanda_dvc.reading import is_there
from wanda_dvc.study.dvc import is_as_locked, is_cached
from wanda_dvc.study.files import link_file, write_json
from wanda_dvc.study.plans import PLAN
from wanda_dvc.study.project import Project, remove


def sources(params: Params) -> dict[str, tuple[str, str]]:
    """Return by part of `download`, and by text as `perplexity/NAME`, the setting with its source, and the source."""
    return {
        "model": ("model", params.model),
        "calibration": ("calibration.text.source", params.calibration.text.source),
        **{
            f"perplexity/{name}": (f"perplexity.texts.{name}.source", text.source)
            for name, text in params.perplexity.texts.items()
        },
        "tasks": ("tasks.source", params.tasks.source),
    }


def local_sources(params: Params) -> Mapping[str, Path]:
    """Return the directories and files named in the settings, by part."""
    named = {part: Path(source) for part, (_, source) in sources(params).items()}
    return {part: path for part, path in named.items() if path.is_absolute()}


def link_source(project: Project, part: str) -> None:
    """Make `sources/<part>`. UserError if the local source is missing."""
    place, (setting, named) = project.source(part), sources(project.params)[part]
    if not Path(named).is_absolute():
        if (project.root / named).exists() and part != "tasks":
            raise UserError(
                f"params.yaml: {setting}: {named} is a place in this study, and would be fetched from the Hub; write "
                f"its absolute path, {project.root / named}"
            )
        write_json(place, {"source": named})
        return
    if not Path(named).exists():
        raise UserError(
            f"params.yaml: {setting}: {named} not found, expected a directory or a file of this machine; "
            "name one that is there"
        )
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(place.name + ".part")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(named)
    if place.is_dir() and not place.is_symlink():  # in a copy of a study that followed links
        remove(place)
    temporary.replace(place)


def missing_sources(project: Project) -> Iterator[str]:
    """Yield a sentence for each linked local source that is missing now."""
    for part in local_sources(project.params):
        link = project.source(part)
        if link.is_symlink() and not link.exists():
            yield f"{link.readlink()} ({part}) is missing: restore it, or name another in params.yaml."


def take_from_the_study(project: Project, part: str, target: Path) -> bool:
    """Link an uncached source into a queued experiment's checkout, from the study that queued it.

    Return False if the study's source is from other settings, or differs from its dvc.lock. The study has resolved its
    Hub branch to a commit, so the branch is not resolved again.
    """
    root, stage = os.environ.get("DVC_ROOT"), f"download-{part.replace('/', '@')}"
    if not root or Path(root).resolve() == project.repository.resolve() or is_cached(project.root, stage):
        return False
    study = Project(Path(root) / project.root.absolute().relative_to(project.repository))
    if part in local_sources(project.params) or not is_there(study.root / PLAN):
        return False
    source, name = study.root / target.relative_to(project.root), f"download/{part}"
    if not source.is_dir() or study.planned(name) != project.planned(name) or not is_as_locked(study.root, stage):
        return False
    shutil.copytree(source, target, copy_function=lambda here, there: link_file(Path(here), Path(there)))
    return True
