"""Presets: complete studies by name, each a YAML file of the differences from a new study's settings."""

import io
from dataclasses import asdict, dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedSeq
from ruamel.yaml.error import YAMLError
from ruamel.yaml.representer import RoundTripRepresenter
from ruamel.yaml.scalarstring import DoubleQuotedScalarString
from tabulate import tabulate

from wanda_dvc.errors import UserError, notice
from wanda_dvc.params import Text, check_params
from wanda_dvc.reading import yaml_problem
from wanda_dvc.study.files import json_text, write_text
from wanda_dvc.study.project import Project
from wanda_dvc.study.settings import Settings, flatten, section_of

FOLDER = files("wanda_dvc.study") / "presets"
PARAMS = files("wanda_dvc.study") / "template" / "params.yaml"  # of a new study: every setting, its default, a comment
DEFAULT = "default"
OF_TEXTS = "perplexity.texts."
DESCRIPTION = "SmolLM2-135M-Instruct and the embedded text and questions; needs PyPI and nothing else"


class _Representer(RoundTripRepresenter):
    """A YAML writer that spells null as `null`. ruamel's own writes nothing."""


_Representer.add_representer(type(None), lambda self, _: self.represent_scalar("tag:yaml.org,2002:null", "null"))


@dataclass(frozen=True)
class Preset:
    """A complete study: a value for every setting but `runtime`, by dotted name."""

    name: str
    description: str
    settings: Settings
    grid: str | None = None


def names() -> list[str]:
    """Return the names of the presets, the default first."""
    found = (file.name.removesuffix(".yaml") for file in FOLDER.iterdir() if file.name.endswith(".yaml"))
    return [DEFAULT, *sorted(found)]


def read_preset(name: str) -> Preset:
    """Read a preset: the default's settings, updated with its own. UserError, with the known names, if unknown."""
    if name not in names():
        raise UserError(f"preset: got {name}, expected {', '.join(names())}; `wanda-dvc preset` describes them")
    default = {key: value for key, value in flatten(_load(PARAMS)) if not key.startswith("runtime.")}
    if name == DEFAULT:
        return Preset(name, DESCRIPTION, default)
    content = _load(FOLDER / f"{name}.yaml")
    texts = content["settings"]["perplexity"]["texts"]
    own = {f"{OF_TEXTS}{text}.{name}": None for text in texts for name in Text.model_fields}
    default = {key: value for key, value in default.items() if not key.startswith(OF_TEXTS)}
    return Preset(name, content["description"], default | own | dict(flatten(content["settings"])), content.get("grid"))


def preset_table(*, as_json: bool = False) -> str:
    """Return the presets' names and descriptions as a table; as JSON with their settings and grids."""
    presets = [read_preset(name) for name in names()]
    if as_json:
        return json_text([asdict(preset) for preset in presets])
    table = tabulate([[preset.name, preset.description] for preset in presets], tablefmt="plain")
    return f"{table}\n\n`wanda-dvc preset NAME` writes one into params.yaml and leaves its `runtime` alone."


def apply_preset(*, project: Project, name: str) -> str:
    """Write a preset into params.yaml and return the next steps. Comments and `runtime` stay.

    Every setting is set, so that no setting of an earlier preset remains. A setting with an equal value keeps its
    spelling.
    """
    preset = read_preset(name)
    path = project.root / "params.yaml"
    old = path.read_text(encoding="utf-8")
    text, changed = with_settings(old, preset.settings)
    model = YAML(typ="safe", pure=True).load(old).get("model", preset.settings["model"])
    if model != preset.settings["model"]:
        notice(f"params.yaml: replacing the model {model} with the preset's; set `model` again to keep yours")
    if changed:
        write_text(path.resolve(), text)  # a link stays a link
    lines = [f"params.yaml: {name}, {preset.description}; {changed} settings changed, `runtime` kept."]
    if preset.grid:
        lines.append(f"All experiments: {preset.grid}")
    lines.append("One experiment: dvc repro" if preset.grid else "To run it: dvc repro")
    return "\n".join(lines)


def with_settings(text: str, settings: Settings) -> tuple[str, int]:
    """Set settings, by dotted name, in the text of a params.yaml; return the text and the number of changed settings.

    If the settings name texts of the perplexity, texts with other names are removed.

    Comments stay, and so does the spelling of equal values. UserError if the result is not valid.
    """
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.preserve_quotes = True
    yaml.width = 2**16  # the user's long lines stay unwrapped
    try:
        content = yaml.load(text)
    except YAMLError as error:
        raise UserError(f"params.yaml: not valid YAML: {yaml_problem(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"params.yaml: got {type(content).__name__}, expected a mapping of settings")
    named = (key.removeprefix(OF_TEXTS).partition(".")[0] for key in settings if key.startswith(OF_TEXTS))
    texts = list(dict.fromkeys(named))
    removed = _keep_texts(content, texts) if texts else []
    changed = removed + [key for key, value in settings.items() if _set(content, key, value)]
    check_params(content)  # refuses a wrong `runtime` or an unknown setting before any write
    if not changed:
        return text, 0
    written = io.StringIO()
    yaml.dump(content, written)
    return written.getvalue(), len(changed)


def _load(file: Traversable) -> Settings:
    return YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))


def _keep_texts(content: Settings, names: list[str]) -> list[str]:
    """Remove the texts of the perplexity with other names, and return these. A renamed text keeps its comments."""
    section: Any = section_of(content, "perplexity.texts.")[0]
    old, new = [name for name in section if name not in names], [name for name in names if name not in section]
    for name in old:
        if new:
            section.insert(list(section).index(name), new.pop(0), section[name])
        del section[name]
    return old


def _set(content: Settings, name: str, value: Any) -> bool:
    """Set one setting in a round-trip document. Return whether it had another value."""
    section, leaf = section_of(content, name)
    # The type counts too: 1 == True == 1.0, and the schema is strict.
    if leaf in section and section[leaf] == value and isinstance(section[leaf], type(value)):
        return False
    section[leaf] = _spell(value)
    return True


def _spell(value: Any) -> Any:
    """Format a value in params.yaml's style: lists on one line, blanks in double quotes."""
    if isinstance(value, list):
        spelled = CommentedSeq(value)
        spelled.fa.set_flow_style()
        return spelled
    return DoubleQuotedScalarString(value) if isinstance(value, str) and value != value.strip() else value
