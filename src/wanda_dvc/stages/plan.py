"""Check the settings, link the local sources, and write what each stage is given of the settings: no torch.

`sources/<name>` is a link to the user's directory or file, or a note if the source is not local. DVC follows the link,
and hashes a file again only after its inode, time or size has changed.
"""

from pathlib import Path

from wanda_dvc.errors import UserError, notice
from wanda_dvc.params import download_sources
from wanda_dvc.stages import WRITTEN, stage_inputs
from wanda_dvc.study.artifact import remove
from wanda_dvc.study.files import write_json
from wanda_dvc.study.folder import Study


def plan(*, study: Study) -> None:
    """params.yaml → plan/, sources/: model, calibration, perplexity/NAME, recovery, tasks, method.

    Several texts of a calibration or a recovery are in a folder, by their numbers.
    """
    params = study.params
    sources = download_sources(params)
    for name, (setting, source) in sources.items():
        _link_source(study, name, setting, source)
    for section in ("calibration", "perplexity", "recovery"):
        folder = study.source(section)
        for path in folder.iterdir() if folder.is_dir() else ():
            if f"{section}/{path.name}" not in sources:  # of a removed text
                remove(path)
    plan = params.plan
    pattern, sparsity = plan.pattern, float(plan.sparsity)
    _link_source(study, "method", "method", plan.method.file)
    ignored = ", ".join(plan.left_out)
    if ignored:
        notice(f"plan: pattern {pattern} has choices of its own: {ignored} ignored (recipe {params.recipe})")
    if sparsity != params.sparsity:
        notice(f"plan: pattern {pattern} sets the sparsity to {sparsity:g}; sparsity {params.sparsity:g} ignored")
    folder = study.root / "plan"
    new = folder.with_name("plan.part")
    remove(new)
    for name, content in stage_inputs(params).items():
        write_json(new / f"{name}.json", content)
    remove(folder)
    new.rename(folder)


def _link_source(study: Study, name: str, setting: str, source: str) -> None:
    """Make `sources/<name>`. UserError if the local source is missing, or a model has dangling links."""
    place = study.source(name)
    if place.is_dir() and not place.is_symlink():  # of several texts
        remove(place)
    if "/" in name and not place.parent.is_dir():
        remove(place.parent)  # of one text
    if not Path(source).is_absolute():
        write_json(place, {"source": source})
        return
    path = Path(source)
    if not (path.is_dir() or path.is_file()):
        problem = "not found, or no file and no directory, expected one; name another"
        raise UserError(f"params.yaml: {setting}: {source} {problem}")
    for file in sorted(path.glob("*")):
        is_read = file.suffix in (".safetensors", ".json")
        if is_read and file.is_symlink() and not file.exists():  # DVC would not name it
            raise UserError(f"params.yaml: {setting}: {file} is a link to a missing file; copy the file there")
    for output in WRITTEN:  # each run would change it
        if path.resolve().is_relative_to(study.root.resolve() / output.partition("/{")[0]):
            raise UserError(
                f"params.yaml: {setting}: {source} is written by this study, expected another place; copy it"
            )
    place.parent.mkdir(parents=True, exist_ok=True)
    remove(place)
    place.symlink_to(source)
