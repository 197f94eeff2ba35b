"""Check the settings, link the local sources, and write what each stage has to know of the others: no torch.

`sources/<part>` is a link to the user's directory or file, or a note if the source is not local. DVC follows the link,
and hashes a file again only after its inode, time or size has changed.
"""

from pathlib import Path

from wanda_dvc.catalog import TEXTS
from wanda_dvc.errors import UserError, notice
from wanda_dvc.params import download_sources
from wanda_dvc.stages import WRITTEN, stage_inputs
from wanda_dvc.study.artifact import remove
from wanda_dvc.study.files import write_json
from wanda_dvc.study.folder import Study


def plan(*, study: Study) -> None:
    """params.yaml → plan/, sources/: model, calibration, perplexity/NAME, recovery, tasks, method."""
    params, texts = study.params, study.source("perplexity")
    parts = download_sources(params)
    for part, (setting, source) in parts.items():
        _link_source(study, part, setting, source)
    for place in texts.iterdir():
        if f"perplexity/{place.name}" not in parts:  # of a removed text
            remove(place)
    plan = params.plan
    pattern, sparsity = plan.pattern, float(plan.sparsity)
    _link_source(study, "method", "method", plan.method.file)
    if ignored := ", ".join(plan.left_out):
        notice(f"plan: pattern {pattern} has choices of its own: {ignored} ignored (recipe {params.recipe})")
    if sparsity != params.sparsity:
        notice(f"plan: pattern {pattern} sets the sparsity to {sparsity:g}; sparsity {params.sparsity:g} ignored")
    folder = study.root / "plan"
    remove(new := folder.with_name("plan.part"))
    for name, content in stage_inputs(params).items():
        write_json(new / f"{name}.json", content)
    remove(folder)
    new.rename(folder)


def _link_source(study: Study, part: str, setting: str, source: str) -> None:
    """Make `sources/<part>`. UserError if the local source is missing."""
    place = study.source(part)
    if not Path(source).is_absolute():
        if part != "tasks" and source not in ("none", *TEXTS) and (study.root / source).exists():
            raise UserError(
                f"params.yaml: {setting}: {source} is a place in this study, and would be fetched from the Hub; write "
                f"its absolute path, {study.root / source}"
            )
        write_json(place, {"source": source})
        return
    if not Path(source).exists():
        raise UserError(f"params.yaml: {setting}: {source} not found, expected a directory or a file; name one")
    _check_readable(setting, Path(source))
    inside, root = Path(source).resolve(), study.root.resolve()
    if any(inside.is_relative_to(root / out.partition("/{")[0]) for out in WRITTEN):  # each run would change it
        raise UserError(f"params.yaml: {setting}: {source} is written by this study, expected another place; copy it")
    place.parent.mkdir(parents=True, exist_ok=True)
    remove(place)
    place.symlink_to(source)


def _check_readable(setting: str, source: Path) -> None:
    """Raise UserError for a named pipe or the like, and for a model with dangling links: DVC would not name them."""
    if source.is_dir():
        for path in sorted(source.iterdir()):
            if path.suffix in (".safetensors", ".json") and path.is_symlink() and not path.exists():
                raise UserError(f"params.yaml: {setting}: {path} is a link to a missing file; copy the file there")
    elif not source.is_file():
        raise UserError(f"params.yaml: {setting}: {source} is no file and no directory, expected one; name another")
