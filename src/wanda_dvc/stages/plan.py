"""Check the settings, link the local sources, and write what each stage is given of the settings: no torch.

`sources/<name>` is a link to the user's directory or file, or a note if the source is not local. DVC follows the link,
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
    """params.yaml → plan/, sources/: model, calibration, perplexity/NAME, recovery, tasks, method.

    Several texts of a calibration or a recovery are in a folder, by their numbers.
    """
    params = study.params
    plan = params.plan
    new_sources, new_inputs = study.root / "sources.part", study.root / "plan.part"
    for folder in (new_sources, new_inputs):
        remove(folder)
    for name, (setting, source) in download_sources(params).items():
        _link_source(study, new_sources / name, setting, source)
    _link_source(study, new_sources / "method", "method", plan.method.file)
    pattern, sparsity, ignored = plan.pattern, float(plan.sparsity), ", ".join(plan.left_out)
    if ignored:
        notice(f"plan: pattern {pattern} has choices of its own: {ignored} ignored (recipe {params.recipe})")
    if sparsity != params.sparsity:
        notice(f"plan: pattern {pattern} sets the sparsity to {sparsity:g}; sparsity {params.sparsity:g} ignored")
    for name, content in stage_inputs(params).items():
        write_json(new_inputs / f"{name}.json", content)
    for folder in (new_sources, new_inputs):
        remove(folder.with_suffix(""))
        folder.rename(folder.with_suffix(""))


def _link_source(study: Study, place: Path, setting: str, source: str) -> None:
    """Make a link or a note. UserError if the local source is missing, or a model has dangling links."""
    if not Path(source).is_absolute():
        if setting != "tasks.source" and source not in ("none", *TEXTS) and (study.root / source).exists():
            problem = f"{setting}: {source} is a place in this study, and would be fetched from the Hub"
            raise UserError(f"params.yaml: {problem}; write its absolute path, {study.root / source}")
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
    place.symlink_to(source)
