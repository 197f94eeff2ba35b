"""`plan/`: what each stage has to know of the settings, resolved once by the stage `plan`.

Stages depend on these files instead of `params.yaml`: the settings say what the user wants, never what a stage needs.
"""

from dataclasses import asdict
from pathlib import Path

from wanda_dvc.catalog import STATISTICS
from wanda_dvc.errors import UserError
from wanda_dvc.params import Params
from wanda_dvc.reading import is_there, read_object
from wanda_dvc.study.files import Json, write_json

PLAN = "plan"
TODO = "run `dvc repro` or `wanda-dvc plan`"


def planned(params: Params) -> dict[str, Json]:
    """Return the content of each file in `plan/`, by its path without `.json`."""
    calibration, plan, tiers = params.calibration, params.plan, STATISTICS[: STATISTICS.index(params.tier) + 1]
    drawn = {
        "windows": calibration.windows,
        "length": calibration.length,
        "seed": calibration.seed,
        "dtype": params.dtype,
    }
    texts = {f"download/perplexity/{name}": asdict(text.chosen) for name, text in params.perplexity.texts.items()}
    return {
        "download/model": {"source": params.model},
        "download/calibration": asdict(calibration.text.chosen),
        **texts,
        "download/tasks": params.tasks.model_dump(),
        **{f"calibrate/{tier}": drawn | {"measured": tier in tiers} for tier in STATISTICS},
        "mask": plan.described,
        "perplexity": {
            "length": params.perplexity.length,
            "windows": params.perplexity.windows,
            "dtype": params.dtype,
        },
        "zero-shot": {"tasks": params.tasks.names, "limit": params.items, "dtype": params.dtype},
    }


def write_plan(root: Path, params: Params) -> None:
    """Write `plan/` into an empty folder."""
    for name, content in planned(params).items():
        write_json(root / f"{name}.json", content)


def read_plan(study: Path, name: str) -> Json:
    """Read one file of a study's `plan/`."""
    path = study / PLAN / f"{name}.json"
    if not is_there(path):
        raise UserError(f"{path}: missing; {TODO} first")
    return read_object(path, TODO)


def check_plan(study: Path, params: Params) -> None:
    """Raise UserError if a study's `plan/` is not what its settings say now."""
    for name, content in planned(params).items():
        if (found := read_plan(study, name)) != content:
            different = sorted(key for key in content.keys() | found.keys() if content.get(key) != found.get(key))
            shown = ", ".join(f"{key} {found.get(key)}" for key in different)
            raise UserError(
                f"{PLAN}/{name}.json: found {shown}, expected {', '.join(str(content.get(x)) for x in different)} as "
                f"params.yaml has it now; {TODO}"
            )
