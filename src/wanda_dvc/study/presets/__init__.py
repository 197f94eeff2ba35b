"""Presets: whole studies by name, each a YAML file of the settings that differ from the default."""

import io
import json
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedSeq
from ruamel.yaml.error import YAMLError
from ruamel.yaml.representer import RoundTripRepresenter
from ruamel.yaml.scalarstring import DoubleQuotedScalarString
from tabulate import tabulate

from wanda_dvc.errors import UserError
from wanda_dvc.params import check_params
from wanda_dvc.study.project import Project
from wanda_dvc.study.settings import Settings, flatten, section_of

FOLDER = files("wanda_dvc.study") / "presets"
DEFAULT = "default"


class _Representer(RoundTripRepresenter):
    """A YAML writer that spells null as `null`. ruamel's own writes nothing."""


_Representer.add_representer(type(None), lambda self, _: self.represent_scalar("tag:yaml.org,2002:null", "null"))


@dataclass(frozen=True)
class Preset:
    """A whole study: a value for every setting but `runtime`, by dotted name."""

    name: str
    description: str
    settings: Settings
    grid: str | None = None


def names() -> list[str]:
    """Return the names of the presets, the default first."""
    found = sorted(file.name.removesuffix(".yaml") for file in FOLDER.iterdir() if file.name.endswith(".yaml"))
    return [DEFAULT, *(name for name in found if name != DEFAULT)]


def read_preset(name: str) -> Preset:
    """Read a preset: the default's settings, replaced by its own. UserError, with the known names, for another name."""
    if name not in names():
        raise UserError(f"preset: got {name}, expected {', '.join(names())}; `wanda-dvc preset` describes them")
    content = _load(name)
    own, default = dict(flatten(content["settings"])), dict(flatten(_load(DEFAULT)["settings"]))
    return Preset(name, content["description"], default | own, content.get("grid"))


def preset_table(*, as_json: bool = False) -> str:
    """Return the presets' names and descriptions as a table; as JSON with their settings and grids."""
    presets = [read_preset(name) for name in names()]
    if as_json:
        return json.dumps([asdict(preset) for preset in presets], indent=2)
    table = tabulate([[preset.name, preset.description] for preset in presets], tablefmt="plain")
    return f"{table}\n\n`wanda-dvc preset NAME` writes one into params.yaml and leaves its `runtime` alone."


def apply_preset(*, project: Project, name: str) -> str:
    """Write a preset into params.yaml and say what to run next. Comments and `runtime` stay.

    Every setting is set, so that nothing of an earlier preset remains. A setting that has the value already keeps its
    spelling.
    """
    preset = read_preset(name)
    path = project.root / "params.yaml"
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.preserve_quotes = True
    yaml.width = 2**16  # the user's long lines stay unwrapped
    try:
        content = yaml.load(path.read_text(encoding="utf-8"))
    except YAMLError as error:
        raise UserError(f"params.yaml: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"params.yaml: got {type(content).__name__}, expected a mapping of settings")
    changed = [key for key, value in preset.settings.items() if _set(content, key, value)]
    check_params(content)  # refuses a wrong `runtime` or an unknown setting before anything is written
    if changed:
        text = io.StringIO()
        yaml.dump(content, text)
        beside = path.with_name("params.yaml.part")
        beside.write_text(text.getvalue(), encoding="utf-8")
        beside.replace(path)
    lines = [f"params.yaml: {name}, {preset.description}; {len(changed)} settings changed, `runtime` kept."]
    if preset.grid:
        lines.append(f"The whole study: {preset.grid}")
    lines.append("One experiment: dvc repro" if preset.grid else "To run it: dvc repro")
    return "\n".join(lines)


def _load(name: str) -> Settings:
    return YAML(typ="safe", pure=True).load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def _set(content: Settings, name: str, value: Any) -> bool:
    """Set one setting in a round-trip document. Return whether it had another value."""
    section, leaf = section_of(content, name)
    # The type counts too: 1 == True == 1.0, and the schema is strict.
    if leaf in section and section[leaf] == value and isinstance(section[leaf], type(value)):
        return False
    section[leaf] = _spell(value)
    return True


def _spell(value: Any) -> Any:
    """Spell a value as params.yaml does: lists on one line, blanks in double quotes."""
    if isinstance(value, list):
        spelled = CommentedSeq(value)
        spelled.fa.set_flow_style()
        return spelled
    return DoubleQuotedScalarString(value) if isinstance(value, str) and value != value.strip() else value
