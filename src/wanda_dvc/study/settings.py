"""Settings by dotted names, such as `calibration.text.split`; presets: named settings of a new study; sources."""

from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import Any

from ruamel.yaml import YAML

from wanda_dvc.errors import UserError
from wanda_dvc.params import Params, check_params

Settings = dict[str, Any]
FOLDER = files("wanda_dvc.study") / "presets"  # a YAML file each: the differences from a new study's settings
PARAMS = files("wanda_dvc.study") / "template" / "params.yaml"  # of a new study
DEFAULT = "default"


def flatten(content: Settings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every nested setting with its dotted name."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value  # a key of YAML may be any value


def nested(settings: Mapping[str, Any]) -> Settings:
    """Nest settings with dotted names: the inverse of `flatten`."""
    content: Settings = {}
    for name, value in settings.items():
        *sections, leaf = name.split(".")
        section = content
        for word in sections:
            section = section.setdefault(word, {})
        section[leaf] = value
    return content


def resolved(params: Params) -> dict[str, Any]:
    """Return every parameter but `runtime` and `recipe`, by dotted name, with nulls replaced by their values."""
    return dict(flatten(params.filled.model_dump(mode="json", exclude={"runtime", "recipe"})))


def preset_names() -> list[str]:
    """Return the names of the presets, the default first."""
    found = (file.name.removesuffix(".yaml") for file in FOLDER.iterdir() if file.name.endswith(".yaml"))
    return [DEFAULT, *sorted(found)]


def preset_changes(name: str) -> Settings:
    """Return a preset's differences from a new study's settings, nested. UserError, with the known names, if unknown.

    Its texts of the perplexity replace the default's.
    """
    if name not in preset_names():
        raise UserError(f"preset: got {name}, expected {', '.join(preset_names())} (docs/my-text.md)")
    if name == DEFAULT:
        return {}
    content: Settings = YAML(typ="safe", pure=True).load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return content


def updated(content: Settings, changes: Settings) -> Settings:
    """Set nested settings in a document, which keeps its comments, and return it. Texts replace all earlier texts."""
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(content.get(key), dict) and key != "texts":
            updated(content[key], value)
        else:
            content[key] = value
    return content


def read_preset(name: str) -> Settings:
    """Return a value for every setting but `runtime`, by dotted name."""
    content = updated(YAML(typ="safe", pure=True).load(PARAMS.read_text(encoding="utf-8")), preset_changes(name))
    return dict(flatten(check_params(content).model_dump(mode="json", exclude={"runtime"})))


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
