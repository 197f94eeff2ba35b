"""Local sources of a study: DVC watches their content through the links in `sources/`.

`sources/<part>` is a link to the user's directory or file, or a note if the source is not local. DVC follows the link,
and hashes a file again only after its inode, time or size has changed.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from wanda_dvc.errors import UserError
from wanda_dvc.params import Params
from wanda_dvc.study.files import write_json
from wanda_dvc.study.project import Project


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
    temporary.replace(place)


def missing_sources(project: Project) -> Iterator[str]:
    """Yield a sentence for each linked local source that is missing now."""
    for part in local_sources(project.params):
        link = project.source(part)
        if link.is_symlink() and not link.exists():
            yield f"{link.readlink()} ({part}) is missing: restore it, or name another in params.yaml."
