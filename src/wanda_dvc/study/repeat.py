"""The commands that run an experiment again."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

from wanda_dvc.params import Params
from wanda_dvc.study.markup import code
from wanda_dvc.study.presets import names, read_preset
from wanda_dvc.study.settings import flatten

PATHS = ("model", "calibration.text.source", "perplexity.text.source")  # settings that may be a path


def how_to_repeat(params: Params) -> tuple[str, str]:
    """Return the commands that run this experiment again, and the settings to write by hand.

    The commands start from the preset with the fewest differences. Paths are local, so only their last part is kept.
    """
    wanted = {key: value for key, value in flatten(params.model_dump(mode="json")) if not key.startswith("runtime.")}
    for key in PATHS:
        if Path(wanted[key]).is_absolute():
            wanted[key] = f"/path/to/{Path(wanted[key]).name}"
    changes = {
        preset.name: {key: value for key, value in wanted.items() if preset.settings[key] != value}
        for preset in map(read_preset, names())
    }
    name = min(changes, key=lambda name: len(changes[name]))
    words, by_hand = [], []
    for key, value in changes[name].items():
        if isinstance(value, str) and re.search(r"[\n\t\\\"$]", value):
            by_hand.append(code(f"{key}: {json.dumps(value, ensure_ascii=False)}"))  # DVC's -S has no escapes
        else:
            words.append(f"-S {shlex.quote(f'{key}={_override(value)}')}")
    commands = f"wanda-dvc preset {name}\n" + " \\\n    ".join(["dvc exp run", *words])
    return commands, f"\nafter setting {', '.join(by_hand)} in params.yaml.\n" if by_hand else ""


def _override(value: Any) -> str:
    """Format a value for `dvc exp run --set-param`."""
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z/][\w./@:\-]*|\d+:\d+", value):
        return f'"{value}"'
    return "null" if value is None else f"[{','.join(value)}]" if isinstance(value, list) else f"{value}"
