"""Write docs/settings.md from the schema, the default preset and the table of stages: python scripts/settings.py."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from wanda_dvc.catalog import ALLOCATIONS, GROUPS, PROPAGATIONS, RECIPES, RECONSTRUCTIONS, methods
from wanda_dvc.params import Text, flatten, read_params, settings
from wanda_dvc.plan import CHOICES
from wanda_dvc.stages import STAGES
from wanda_dvc.study.scaffold import PARAMS

TARGET = Path(__file__).parent.parent / "docs" / "settings.md"
HEAD = """\
# Settings

`params.yaml` must name `model` and the texts. Defaults are a new study's; if missing,
`perplexity.windows` is null, `tasks.names` `[]`. A change reruns the stages named and those after them.

"""
TEXTS = ("calibration.text.", "perplexity.texts.NAME.")


def page() -> str:
    """Return the page."""
    defaults = dict(flatten(read_params(Path(str(PARAMS))).model_dump(mode="json", exclude={"runtime"})))
    rows = []
    for name, field in settings():
        if not name.startswith(TEXTS[1]):  # a text's settings are described once
            default, leaf = _spelled(defaults.get(name, field.default)), name.rpartition(".")[2]
            is_of_both = name.startswith(TEXTS[0]) and leaf in Text.model_fields
            shown = f"`{name}`, `{TEXTS[1]}{leaf}`" if is_of_both else f"`{name}`"
            stages = _stages(name)[:1] if is_of_both else _stages(name)  # the first stage of both texts
            if leaf == "windows":  # `download` gets all of a text's settings but these
                stages = [stage for stage in stages if stage != "`download`"]
            meaning = f"{field.description[0].upper()}{field.description[1:]}."
            rows.append([shown, meaning, f"`{default}`", ", ".join(stages) or "`plan`"])
    recipes = [[row.name, row.about, *(getattr(row, choice) for choice in CHOICES)] for row in RECIPES.values()]
    allocations = [[x.name, x.about] for x in ALLOCATIONS.values()]
    sections = {
        "Recipes": _table(["`recipe`", "result", *CHOICES], recipes),
        "Methods": _table(["`method`", "meaning", "paper"], [(x.name, x.about, x.paper) for x in methods().values()]),
        "Groups": _table(["`group`", "meaning"], GROUPS.items()),
        "Allocations": _table(["`allocation`", "sparsities"], allocations),
        "Reconstructions": _choices("reconstruction", RECONSTRUCTIONS),
        "Propagation": _table(["`propagation`", "calibration"], PROPAGATIONS.items()),
    }
    tables = [f"## {title}\n\n{table}\n" for title, table in sections.items()]
    return "\n".join([f"{HEAD}{_table(['setting', 'meaning', 'default', 'stage'], rows)}\n", *tables])


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    quoted = [
        [row[0] if "`" in row[0] else f"`{row[0]}`", *(cell.replace("|", "\\|") for cell in row[1:])] for row in rows
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in [headers, ["---"] * len(headers), *quoted])


def _choices(setting: str, table: Mapping[str, Any]) -> str:
    return _table([f"`{setting}`", "meaning"], [(row.name, row.about) for row in table.values()])


def _stages(name: str) -> list[str]:
    """Return the stages that read a setting."""
    read = {row.name: [one for part in row.variants.values() for one in part.settings] for row in STAGES.values()}
    return [f"`{stage}`" for stage, some in read.items() if any(f"{name}.".startswith(f"{one}.") for one in some)]


def _spelled(value: object) -> str:
    """Return a value as params.yaml writes it."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return repr(value).replace("'", '"') if isinstance(value, str) and value != value.strip() else str(value)


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
