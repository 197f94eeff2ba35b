"""Converts settings between dotted names, such as `calibration.text.split`, and params.yaml's nested form."""

from collections.abc import Iterator, Mapping
from typing import Any

from wanda_dvc.params import Params

Settings = dict[str, Any]


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
        section, leaf = section_of(content, name)
        section[leaf] = value
    return content


def section_of(content: Settings, name: str) -> tuple[Settings, str]:
    """Return the mapping that holds a dotted setting, and the setting's last word. Missing mappings are added."""
    *sections, leaf = name.split(".")
    for section in sections:
        if not isinstance(content.get(section), dict):
            content[section] = {}
        content = content[section]
    return content, leaf


def resolved(params: Params) -> dict[str, Any]:
    """Return every parameter but `runtime` and `recipe`, by dotted name, with nulls replaced by their values."""
    return dict(flatten(params.filled.model_dump(mode="json", exclude={"runtime", "recipe"})))
