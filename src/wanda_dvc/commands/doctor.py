"""Check the machine and the study before a run, as far as a stage or `dvc` does not refuse at once with advice."""

import contextlib
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from wanda_dvc import __version__
from wanda_dvc.engine import accelerator
from wanda_dvc.engine.memory import ModelSizes
from wanda_dvc.errors import UserError
from wanda_dvc.machine import cores
from wanda_dvc.params import Params
from wanda_dvc.reading import is_there
from wanda_dvc.results.markup import table
from wanda_dvc.stages import STAGES
from wanda_dvc.stages.device import free_memory_of, own_device
from wanda_dvc.stages.needs import MEMORY_AND_DISK, Requirements, free, gigabytes, requirements
from wanda_dvc.study.files import json_text
from wanda_dvc.study.folder import Study


class Check(NamedTuple):
    """A row of the table: what was checked, and the result. Stages run even if a check without `needed` fails."""

    what: str
    good: bool
    result: str
    needed: bool = True


def doctor(*, start: Path, as_json: bool = False) -> tuple[str, bool]:
    """Check the study around a folder. Return a table, or JSON, and whether every needed check passed."""
    libraries = [f"{name} {version(name)}" for name in ("torch", "transformers", "dvc", "lm-eval")]
    versions = ", ".join([__version__, f"Python {platform.python_version()}", *libraries])
    checks = [Check("wanda-dvc", True, versions)]  # for a bug report
    needs: dict[str, Requirements] = {}
    try:
        study = Study.find(start)
        checks += [Check("params.yaml", True, "valid"), *_check_machine(study.params)]
        needs = _needs(study)
        checks += _check_needs(study, needs)
    except UserError as error:
        checks += [Check("params.yaml", False, problem) for problem in error.problems]
    missing = list(dict.fromkeys(check.what for check in checks if check.needed and not check.good))
    if as_json:
        sizes = {stage: {"memory_bytes": size.memory, "disk_bytes": size.disk} for stage, size in needs.items()}
        content = {"checks": [check._asdict() for check in checks], "missing": missing, "needs": sizes}
        return json_text(content), not missing
    rows = [[check.what, "✓" if check.good else "✗", check.result] for check in checks]
    conclusion = f"Missing: {', '.join(missing)}." if missing else "Nothing that is needed is missing."
    return f"{table(['what', '', 'result'], rows)}\n\n{conclusion}", not missing


def _needs(study: Study) -> dict[str, Requirements]:
    needs = {}
    with contextlib.suppress(UserError):  # no model, or one that `download` refuses
        sizes = ModelSizes.read(study.model("dense"))
        for stage in MEMORY_AND_DISK:
            if any(variant.wanted(study.params) for variant in STAGES[stage].variants.values()):
                needs[stage] = requirements(study, stage, sizes, free(study)["memory"])
    return needs


def _check_machine(params: Params) -> Iterator[Check]:
    yield Check("cpu", True, f"threads: {cores()}; {gigabytes(free_memory_of('cpu'))} of memory free")
    for gpu in accelerator.gpus():
        yield Check(gpu, True, f"{accelerator.gpu_name(gpu)}, {gigabytes(free_memory_of(gpu))} free")
    if params.runtime.ray is None:  # else the workers need it
        yield Check("runtime.device", True, str(own_device(params.runtime)))


def _check_needs(study: Study, needs: dict[str, Requirements]) -> Iterator[Check]:
    sizes_free = free(study)
    for what, size in sizes_free.items():
        yield Check(what, True, f"{gigabytes(size)} free")
    if not needs:
        reason = "the model is not valid" if is_there(study.model("dense")) else "run `dvc repro download-model` first"
        yield Check("needs", True, f"unknown: {reason}")
    for stage, need in needs.items():
        result = f"needs about {gigabytes(need.memory)} of memory and {gigabytes(need.disk)} of disk"
        lacking = [what for what, size in sizes_free.items() if getattr(need, what) >= size]
        if lacking:
            result += f"; not enough {' and '.join(lacking)} free"
        yield Check(stage, not lacking, result, needed="disk" in lacking)  # an estimate of memory may be high
