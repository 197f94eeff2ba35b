"""Write docs/settings.md from the schema, the default preset and the table of stages: python scripts/settings.py."""

from pathlib import Path

from tabulate import tabulate

from wanda_dvc.params import settings
from wanda_dvc.stages import STAGES
from wanda_dvc.study.presets import DEFAULT, read_preset

TARGET = Path(__file__).parent.parent / "docs" / "settings.md"
HEAD = """\
# Settings

Every setting of `params.yaml`. A change reruns the stages named and those after them; `runtime` reruns nothing.
`scripts/settings.py` writes this page from the schema.

"""


def page() -> str:
    """Return the page."""
    defaults = read_preset(DEFAULT).settings
    rows = []
    for name, field in settings():
        default = defaults.get(name, field.default)
        rows.append([f"`{name}`", f"`{_spelled(default)}`", ", ".join(_stages(name)) or "–", _meaning(field)])
    table = tabulate(rows, ["setting", "default", "stage", "meaning"], tablefmt="github", disable_numparse=True)
    return f"{HEAD}{table}\n"


def _stages(name: str) -> list[str]:
    """Return the stages that read a setting."""
    found = []
    for stage in STAGES.values():
        for part in stage.parts or [None]:
            reads = any(name == one or name.startswith(f"{one}.") for one in stage.settings_of(part))
            if reads and f"`{stage.name}`" not in found:
                found.append(f"`{stage.name}`")
    return found


def _meaning(field: object) -> str:
    description = str(getattr(field, "description", ""))
    return f"{description[:1].upper()}{description[1:]}.".replace("|", "\\|")


def _spelled(value: object) -> str:
    """Return a value as params.yaml writes it."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return repr(value).replace("'", '"') if isinstance(value, str) and value != value.strip() else str(value)


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
