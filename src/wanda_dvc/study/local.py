"""The sources of a study that are files of this machine: `sources/`, through which DVC watches their content.

`sources/<part>` is a link to the user's directory or file; of a source that is not local, a note. DVC hashes through a
link, and a file again only when its inode, time or size has changed.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from wanda_dvc.errors import UserError
from wanda_dvc.params import Params
from wanda_dvc.study.files import write_json
from wanda_dvc.study.project import Project

# The setting that names the source of each part that `download` fetches.
SETTINGS = {
    "model": "model",
    "calibration": "calibration.text.source",
    "perplexity": "perplexity.text.source",
    "tasks": "tasks.source",
}


def source(params: Params, part: str) -> str:
    """Return the setting that names a part's source."""
    value: Any = params
    for name in SETTINGS[part].split("."):
        value = getattr(value, name)
    return str(value)


def local_sources(params: Params) -> Mapping[str, Path]:
    """Return the directories and files that the settings name, by part."""
    named = {part: Path(source(params, part)) for part in SETTINGS}
    return {part: path for part, path in named.items() if path.is_absolute()}


def link_source(project: Project, part: str) -> None:
    """Make `sources/<part>`. UserError if the local source is not there."""
    place, named = project.source(part), source(project.params, part)
    if not Path(named).is_absolute():
        write_json(place, {"source": named})
        return
    if not Path(named).exists():
        raise UserError(
            f"params.yaml: {SETTINGS[part]}: {named} not found, expected a directory or a file of this machine; "
            "name one that is there"
        )
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_name(place.name + ".part")
    beside.unlink(missing_ok=True)
    beside.symlink_to(named)
    beside.replace(place)


def changed_sources(project: Project) -> Iterator[str]:
    """Yield a sentence for each local source that is gone, or has another content than `download` has seen.

    DVC is asked, and so a file hashed, only where a file has been touched since its source was linked.
    """
    touched = []
    for part, path in local_sources(project.params).items():
        link = project.source(part)
        if not link.is_symlink():
            continue  # `locate` has not run, and nothing is known of it
        if not link.exists():
            yield f"{link.readlink()} ({part}) is gone: name another in params.yaml, or put it back."
        elif link.readlink() == path and _last_change(path) > link.lstat().st_mtime_ns:
            touched.append(part)
    changed = _changed(project) if touched else set()
    for part in touched:
        if part in changed:
            where = project.source(part).readlink()
            yield f"{where} ({part}) has changed since it was fetched: `dvc repro` fetches it."


def _last_change(path: Path) -> int:
    """The last change of a file, or of a directory and the files directly in it, in nanoseconds."""
    there = [path, *path.iterdir()] if path.is_dir() else [path]
    return max(one.stat().st_ctime_ns for one in there if one.exists())


def _changed(project: Project) -> set[str]:
    """The parts whose source DVC finds changed."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(project.root)) as repo:
            status = repo.status([f"{project.root / 'dvc.yaml'}:locate"])
    except DvcException:
        return set()  # no repository, or none with this stage: `doctor` says so
    found = [
        name for one in next(iter(status.values()), []) if isinstance(one, dict) for name in one.get("changed outs", {})
    ]
    return {Path(name).name for name in found}  # whatever folder DVC names them from
