"""Write docs/settings.md from the schema, the default preset and the table of stages: python scripts/settings.py."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from wanda_dvc.catalog import ALLOCATIONS, GROUPS, PROPAGATIONS, RECIPES, RECONSTRUCTIONS, Choice, Recipe, methods
from wanda_dvc.params import Text, flatten, read_params, settings
from wanda_dvc.plan import CHOICES
from wanda_dvc.stages import STAGES
from wanda_dvc.study.scaffold import PARAMS

TARGET = Path(__file__).parent.parent / "docs" / "settings.md"
HEAD = """\
# Settings

`params.yaml` must name `model` and the texts. Defaults are a new study's; if missing,
`perplexity.windows` is null, `tasks.names` `[]`. A change reruns the stage of its row, and those that
read its results; `calibrate` too, if statistics are missing.

"""
# What most recipes choose.
COMMON = {"group": "row", "allocation": "uniform", "reconstruction": "none", "propagation": "dense"}
RECIPE_HEAD = f"Where none is named: {', '.join(f'{name} `{common}`' for name, common in COMMON.items())}."
TEXTS = ("calibration.text.", "perplexity.texts.NAME.")


def page() -> str:
    """Return the page."""
    defaults = dict(flatten(read_params(Path(str(PARAMS))).model_dump(mode="json", exclude={"runtime"})))
    rows = []
    meanings = {}
    for name, field in settings():
        if not name.startswith(TEXTS[1]):  # a text's settings are described once
            default, leaf = _spelled(defaults.get(name, field.default)), name.rpartition(".")[2]
            is_of_both = name.startswith(TEXTS[0]) and leaf in Text.model_fields
            shown = f"`{name}`, `{TEXTS[1]}{leaf}`" if is_of_both else f"`{name}`"
            meanings[name] = meaning = f"{field.description[0].upper()}{field.description[1:]}."
            if name in CHOICES:  # a section of its own
                continue
            rows.append([shown, meaning, f"`{default}`", _stage(name)])
    sections = {
        "Recipes": f"{RECIPE_HEAD}\n\n{_meanings({name: ', '.join(_choices(row)) for name, row in RECIPES.items()})}",
        "Methods": f"`method`: {meanings['method']}\n\n{_list(methods().values())}",
        "Groups": f"`group`: {meanings['group']}\n\n{_meanings(GROUPS)}",
        "Allocations": f"`allocation`: {meanings['allocation']}\n\n{_list(ALLOCATIONS.values())}",
        "Reconstructions": f"`reconstruction`: {meanings['reconstruction']}\n\n{_list(RECONSTRUCTIONS.values())}",
        "Propagation": f"`propagation`: {meanings['propagation']}\n\n{_meanings(PROPAGATIONS)}",
    }
    blocks = [f"## {title}\n\n{block}\n" for title, block in sections.items()]
    return "\n".join([f"{HEAD}{_table(['setting', 'meaning', 'default', 'stage'], rows)}\n", *blocks])


def _choices(recipe: Recipe) -> list[str]:
    """Return the recipe's method, and its choices that most recipes do not have."""
    chosen = {name: getattr(recipe, name) for name in ("method", *COMMON)}
    return [f"{name} `{choice}`" for name, choice in chosen.items() if choice != COMMON.get(name)]


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    quoted = [
        [row[0] if "`" in row[0] else f"`{row[0]}`", *(cell.replace("|", "\\|") for cell in row[1:])] for row in rows
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in [headers, ["---"] * len(headers), *quoted])


def _list(choices: Iterable[Choice]) -> str:
    return "\n".join(f"- `{one.name}`: {one.about}{f'. {one.paper}' if one.paper else ''}" for one in choices)


def _meanings(choices: Mapping[str, str]) -> str:
    return "\n".join(f"- `{name}`: {meaning}" for name, meaning in choices.items())


def _stage(setting: str) -> str:
    """Return the first stage that a change reruns; of a recipe's choices `mask`, because `calibrate` seldom runs."""
    parts = {row.name: [one for part in row.variants.values() for one in part.settings] for row in STAGES.values()}
    stages = [name for name, some in parts.items() if any(f"{setting}.".startswith(f"{one}.") for one in some)]
    if setting.endswith(("text.windows", "tasks.limit")):  # `download` gets all settings of texts and tasks but these
        stages.remove("download")
    return f"`{'mask' if 'mask' in stages else stages[0] if stages else 'plan'}`"


def _spelled(value: object) -> str:
    """Return a value as params.yaml writes it."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return repr(value).replace("'", '"') if isinstance(value, str) and value != value.strip() else str(value)


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
