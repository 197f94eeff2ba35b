"""A new study: an empty directory becomes a git and DVC repository with the pipeline and its settings.

The files are in `template/`. The wanda-dvc repository is also a study; a test keeps its files identical.
"""

import io
import json
import os
import shlex
import shutil
from collections.abc import Sequence
from copy import copy
from importlib.resources import files
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.representer import RoundTripRepresenter

from wanda_dvc.catalog import HUB_ID, TEXTS
from wanda_dvc.errors import UserError, shortened
from wanda_dvc.params import TEXT_SUFFIXES, Params, Settings, check_params, nested, parse_yaml
from wanda_dvc.reading import check_place, read_text
from wanda_dvc.study.dvc import checkout, git, init_repository, link_file, share_cache
from wanda_dvc.study.files import write_text

TEMPLATE = files("wanda_dvc.study") / "template"
PARAMS = TEMPLATE / "params.yaml"
# A YAML file each: the differences from a new study's settings.
PRESETS = {file.name.removesuffix(".yaml"): file for file in (files("wanda_dvc.study") / "presets").iterdir()}
DEFAULT = "default"
PIPELINE = "dvc.yaml"
# By their place in a study. In the package they have other names: git and DVC would use files with these names.
FILES = {
    PIPELINE: TEMPLATE / "pipeline.yaml", "params.yaml": PARAMS,
    ".gitignore": TEMPLATE / "gitignore", ".dvcignore": TEMPLATE / "dvcignore", ".dvc/config": TEMPLATE / "config",
    "README.md": TEMPLATE / "README.md",
    **{f".dvc/plots/{plot.name}": plot for plot in (TEMPLATE / "plots").iterdir() if plot.name.endswith(".json")},
}  # fmt: skip


def init(
    *,
    folder: Path,
    preset: str = DEFAULT,
    model: str | None = None,
    calibration: str | Sequence[str] = (),
    study: Path | None = None,
) -> str:
    """Make a study in a new or empty directory, and return the next steps. Nothing is fetched.

    With `study` it begins with the settings and results of that study. In a git repository it becomes a part of it.
    """
    folder = check_place(folder)
    names = sorted(path.name for path in folder.iterdir() if path.name != ".git") if folder.is_dir() else []
    if names:
        raise UserError(f"{folder}: holds {shortened(names)}, expected a new or an empty directory; name another")
    options = nested(source_settings(model, calibration))
    text = read_text(study / "params.yaml", "name a study") if study else PARAMS.read_text(encoding="utf-8")
    params, text = changed(text, preset_changes(preset), options)
    git_root = _repository_around(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if git_root is None:
        git(folder, "init", "--quiet", check=True)
    init_repository(folder, inside=git_root not in (None, folder.resolve()))
    _write_files(folder, text)
    if study and (study / "dvc.lock").is_file():
        _copy_results(study, folder)
    git(folder, "add", "--all", ".", check=True)
    commit = ("commit", "--quiet", "--message", "Begin a pruning study")
    committed = git_root is None and not git(folder, *commit).returncode  # experiments start from a commit
    lines = [f"{folder}: a study of {params.model}."]
    if git_root is not None:
        lines.append(f"It is a part of the git repository {git_root}, with a DVC repository of its own.")
    lines += ["", "Run next:", f"  cd {shlex.quote(os.path.relpath(folder))}"]
    if not committed:
        lines.append('  git add . && git commit -m "Begin a pruning study" .   # experiments start from a commit')
    return "\n".join(lines) + (TEMPLATE / "next_steps").read_text(encoding="utf-8").rstrip()


def _write_files(folder: Path, params_text: str) -> None:
    for name, file in FILES.items():
        write_text(folder / name, params_text if name == "params.yaml" else file.read_text(encoding="utf-8"))


def _copy_results(study: Path, folder: Path) -> None:
    """Copy a study's results; cached files never change, so links to them are enough. `dvc repro` writes the rest.

    Both studies use a cache that is elsewhere.
    """
    share_cache(folder, study)
    for name, copy_file in ((".dvc/cache", link_file), ("metrics", shutil.copy)):
        if (study / name).is_dir():
            shutil.copytree(study / name, folder / name, copy_function=copy_file, dirs_exist_ok=True)
    shutil.copy(study / "dvc.lock", folder)
    checkout(folder)


def renew(folder: Path, settings: Settings) -> None:
    """Make a study without git, or renew the files of one, all but its results. UserError if a setting is wrong."""
    _, text = new_params(settings)
    _write_files(folder, text)
    # A study with git has no such file: users share it. It leaves out `reflink`, with which DVC keeps a second copy of
    # each output on file systems without reflinks, such as ext4.
    write_text(folder / ".dvc/config.local", (TEMPLATE / "config_without_git").read_text(encoding="utf-8"))


class _Representer(RoundTripRepresenter):
    """A YAML writer that spells null as `null`. ruamel's own writes nothing."""


_Representer.add_representer(type(None), lambda self, _: self.represent_scalar("tag:yaml.org,2002:null", "null"))


def new_params(*changes: Settings) -> tuple[Params, str]:
    """Return the settings and the params.yaml of a new study with nested changes. UserError if a setting is wrong."""
    return changed(PARAMS.read_text(encoding="utf-8"), *changes)


def changed(text: str, *changes: Settings) -> tuple[Params, str]:
    """Return the settings and the text of a params.yaml with nested changes, and its comments.

    UserError, with all problems, if a setting is wrong.
    """
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.width = 2**16  # long comments stay on their lines
    content = parse_yaml(text, "params.yaml", "correct it, or restore it from git", yaml)
    for change in changes:
        updated(content, _plain(change))
    params, output = check_params(content), io.StringIO()
    yaml.dump(content, output)
    return params, output.getvalue()


def _plain(settings: Settings) -> Any:
    """Return settings as JSON has them: numbers of NumPy and torch as Python's own."""
    return json.loads(json.dumps(settings, default=lambda x: x.item() if getattr(x, "ndim", None) == 0 else str(x)))


def source_settings(model: str | None, calibration: str | Sequence[str]) -> Settings:
    """Return the settings of a model and of calibration texts. Paths become absolute: experiments run elsewhere."""
    settings: Settings = {} if model is None else {"model": absolute_source(model, is_text=False)}
    names = [calibration] if isinstance(calibration, str) else calibration
    texts = [{"source": absolute_source(name, is_text=True), "split": None} for name in names]
    if texts:
        settings["calibration.text"] = texts[0] if len(texts) == 1 else texts
    return settings


def absolute_source(source: str, *, is_text: bool) -> str:
    """Return a source as params.yaml names it. A path of this machine precedes a Hub id of the same name."""
    if is_text and source in TEXTS:
        return source
    path = Path(os.path.expanduser(source))  # noqa: PTH111 - Path's own raises an error for an unknown user
    exists = (path.is_file() and path.suffix in TEXT_SUFFIXES) if is_text else path.is_dir()
    if exists and str(path.resolve()).isprintable():  # else its bytes are no UTF-8
        return str(path.resolve())
    is_in_folder = "/" in source and "@" not in source and path.parent.is_dir()
    is_path = source.startswith((".", "~", os.sep)) or path.suffix in TEXT_SUFFIXES or is_in_folder
    if is_path or os.path.lexists(path):
        expected = f"a {'.txt or .jsonl file' if is_text else 'directory of safetensors'}, named in UTF-8"
        hub = f", or write {source}@main for the repository on the Hub" if HUB_ID.fullmatch(source) else ""
        raise UserError(f"{path.absolute()}: missing, or not {expected}; name one of this machine{hub}")
    return source


def _repository_around(folder: Path) -> Path | None:
    """Return the root of the git repository around a directory, which may not exist yet; None outside repositories."""
    nearest = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    top = git(nearest, "rev-parse", "--show-toplevel")
    if top.returncode == 0:
        return Path(top.stdout.strip()).resolve()
    if (folder / ".git").exists() or "not a git repository" not in top.stderr:
        message = " ".join(top.stderr.split())
        raise UserError(f"{folder}: git does not open the repository here ({message}); follow its advice")
    return None


def preset_changes(name: str) -> Settings:
    """Return a preset's differences from a new study's settings, nested. UserError for an unknown name."""
    if name not in PRESETS:
        raise UserError(f"preset: got {name}, expected {', '.join(sorted(PRESETS))} (docs/data.md)")
    return YAML(typ="safe", pure=True).load(PRESETS[name].read_text(encoding="utf-8"))


def updated(content: Settings, changes: Settings) -> Settings:
    """Set nested settings in a document, which keeps its comments, and return it.

    The texts of a perplexity replace all earlier ones. A text that names its source keeps nothing of the earlier text.
    """
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(content.get(key), dict) and key != "texts":
            section = copy(content[key])  # an alias of it stays as it is
            if key == "text" and "source" in value:
                for name in section.keys() - value.keys():
                    del section[name]
            content[key] = updated(section, value)
        else:
            content[key] = value
    return content
