"""Whole studies by name: each a YAML file of the settings in which it differs from the default."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
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

FOLDER = files("wanda_dvc.study") / "presets"
DEFAULT = "default"

Settings = dict[str, Any]


class _Representer(RoundTripRepresenter):
    """Writes null as `null`, as people do, and not as nothing."""


_Representer.add_representer(type(None), lambda self, _: self.represent_scalar("tag:yaml.org,2002:null", "null"))


@dataclass(frozen=True)
class Preset:
    """Every setting but `runtime`, by dotted name: the default's with the preset's own in their place."""

    name: str
    description: str
    settings: Settings
    grid: str | None = None


def names() -> list[str]:
    """The presets there are, the default first."""
    found = sorted(file.name.removesuffix(".yaml") for file in FOLDER.iterdir() if file.name.endswith(".yaml"))
    return [DEFAULT, *(name for name in found if name != DEFAULT)]


def read_preset(name: str) -> Preset:
    """UserError, with the names there are, if it is none of them."""
    if name not in names():
        raise UserError(f"preset: got {name}, expected {', '.join(names())}; `wanda-dvc preset` describes them")
    content = _load(name)
    own, default = dict(flatten(content["settings"])), dict(flatten(_load(DEFAULT)["settings"]))
    return Preset(name, content["description"], default | own, content.get("grid"))


def preset_table() -> str:
    presets = [read_preset(name) for name in names()]
    table = tabulate([[preset.name, preset.description] for preset in presets], tablefmt="plain")
    return f"{table}\n\n`wanda-dvc preset NAME` writes one into params.yaml and leaves its `runtime` alone."


def apply_preset(*, project: Project, name: str) -> str:
    """Write a preset into params.yaml, whose comments and `runtime` stay; what to do next.

    Every setting is set, so that nothing of an earlier preset is left behind. What changes nothing
    keeps its spelling too.
    """
    preset = read_preset(name)
    path = project.root / "params.yaml"
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.preserve_quotes = True
    yaml.width = 2**16  # a line of the user's is not wrapped
    try:
        content = yaml.load(path.read_text(encoding="utf-8"))
    except YAMLError as error:
        raise UserError(f"params.yaml: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"params.yaml: got {type(content).__name__}, expected a mapping of settings")
    changed = [key for key, value in preset.settings.items() if _set(content, key.split("."), value)]
    check_params(content)  # what is wrong in what stays, `runtime` or a setting that is none, is said before writing
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


def flatten(content: Settings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings by dotted name."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _load(name: str) -> Settings:
    return YAML(typ="safe", pure=True).load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def _set(content: Settings, where: list[str], value: Any) -> bool:
    """Set one setting in a round-trip document; whether it was another before."""
    *sections, leaf = where
    for section in sections:
        if not isinstance(content.get(section), dict):
            content[section] = {}
        content = content[section]
    # The type too: 1 == True == 1.0, and the schema is strict.
    if leaf in content and content[leaf] == value and isinstance(content[leaf], type(value)):
        return False
    content[leaf] = _spell(value)
    return True


def _spell(value: Any) -> Any:
    """As params.yaml has them: short lists in one line, blanks in double quotes."""
    if isinstance(value, list):
        spelled = CommentedSeq(value)
        spelled.fa.set_flow_style()
        return spelled
    return DoubleQuotedScalarString(value) if isinstance(value, str) and value != value.strip() else value
