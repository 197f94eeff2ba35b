"""The results of a pruned model and the commands that repeat it, as sections of its model card."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

from wanda_dvc.params import Params
from wanda_dvc.results.compare import side_by_side
from wanda_dvc.results.experiments import Experiment
from wanda_dvc.results.measures import continued
from wanda_dvc.results.show import not_compared, notes
from wanda_dvc.study.card import table
from wanda_dvc.study.markup import code, inline
from wanda_dvc.study.provenance import read_provenance
from wanda_dvc.study.settings import flatten, preset_names, read_preset, sources

REPRODUCE = """\
With wanda-dvc {version}, in a new study:

```
{commands}
```
{by_hand}"""


def sections(experiment: Experiment) -> dict[str, str]:
    """Return the sections on the results of an experiment, by their titles."""
    models = {"dense": experiment.dense, "pruned": experiment.pruned}
    headers, rows = side_by_side(models, base="dense")
    said = [*experiment.notes, *not_compared(experiment.pruned, experiment.dense), *notes(experiment.params, models)]
    found = {"Results": f"{table(headers, rows)}\n\n" + "\n".join(f"- {inline(note)}" for note in said)}
    if pairs := continued(experiment.pruned, experiment.dense):
        texts = [[inline(text) for text in pair] for pair in pairs]
        found["Continuations"] = f"Each token is the likeliest one.\n\n{table(['prompt', 'dense', 'pruned'], texts)}"
    commands, by_hand = how_to_repeat(experiment.params)
    version = read_provenance(experiment.study.masks, "mask")["wanda_dvc"]
    found["Reproduce"] = REPRODUCE.format(version=version, commands=commands, by_hand=by_hand).rstrip()
    return found


def how_to_repeat(params: Params) -> tuple[str, str]:
    """Return the commands that run an experiment again, and the settings to write by hand.

    The commands start from the preset with the fewest differences. Paths are local, so only their last part is kept.
    """
    wanted = {key: value for key, value in flatten(params.model_dump(mode="json")) if not key.startswith("runtime.")}
    for setting, source in sources(params).values():
        if Path(source).is_absolute():
            wanted[setting] = f"/path/to/{Path(source).name}"
    presets = {name: read_preset(name) for name in preset_names()}
    changes = {
        name: {key: value for key, value in wanted.items() if key not in settings or settings[key] != value}
        for name, settings in presets.items()
    }
    name = min(changes, key=lambda name: len(changes[name]))
    others = {key.rpartition(".")[0] for key in presets[name].keys() - wanted.keys()}  # texts of the preset alone
    words, by_hand = [f"-S '~{text}'" for text in sorted(others)], []
    for key, value in changes[name].items():
        new = "" if key in presets[name] else "+"
        if isinstance(value, str) and re.search(r"[\n\t\\\"$]", value):
            by_hand.append(code(f"{key}: {json.dumps(value, ensure_ascii=False)}"))  # DVC's -S has no escapes
        else:
            words.append(f"-S {shlex.quote(f'{new}{key}={_override(value)}')}")
    commands = f"wanda-dvc init study --preset {name} && cd study\n" + " \\\n    ".join(["dvc exp run", *words])
    return commands, f"\nafter setting {', '.join(by_hand)} in params.yaml.\n" if by_hand else ""


def _override(value: Any) -> str:
    """Format a value for `dvc exp run --set-param`."""
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z/][\w./@:\-]*|\d+:\d+", value, re.ASCII):
        return f'"{value}"'
    return "null" if value is None else f"[{','.join(value)}]" if isinstance(value, list) else f"{value}"
