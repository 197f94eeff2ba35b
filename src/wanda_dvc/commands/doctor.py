"""Check the machine and the study before a run, and report findings, missing parts and next steps.

What a stage or `dvc` refuses at once, with its own advice, is not checked here.
"""

import contextlib
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from wanda_dvc import __version__
from wanda_dvc.engine import accelerator
from wanda_dvc.errors import UserError
from wanda_dvc.machine import cores
from wanda_dvc.params import Params
from wanda_dvc.reading import is_there
from wanda_dvc.results.markup import table
from wanda_dvc.stages import STAGES
from wanda_dvc.stages.device import free_memory, own_device
from wanda_dvc.stages.needs import NEEDS, Requirements, free, gigabytes, need
from wanda_dvc.study.files import json_text
from wanda_dvc.study.folder import Study

SHOWN = ("torch", "transformers", "dvc", "lm-eval")


@dataclass(frozen=True)
class Check:
    """The result of one check. Stages run even if a check without `needed` fails."""

    what: str
    good: bool
    found: str
    todo: str = ""
    needed: bool = True


def doctor(*, start: Path, as_json: bool = False) -> tuple[str, bool]:
    """Check the study around a folder. Return a table, or JSON, and whether every needed check passed."""
    needs: dict[str, Requirements] = {}
    checks = [  # the versions for a bug report
        Check("wanda-dvc", True, f"{__version__}, Python {platform.python_version()}"),
        Check("libraries", True, ", ".join(f"{name} {version(name)}" for name in SHOWN)),
    ]
    try:
        study = Study.find(start)
        params = study.params
    except UserError as error:
        todo = "correct it, cd into a study, or `wanda-dvc init DIR`"
        checks += [Check("params.yaml", False, problem, todo) for problem in error.problems]
    else:
        with contextlib.suppress(UserError, ValueError, KeyError, OSError):  # no model, or an invalid one
            wanted = [name for name in NEEDS if any(part.wanted(params) for part in STAGES[name].variants.values())]
            needs = {stage: need(study, stage) for stage in wanted}
        checks.append(Check("params.yaml", True, "valid"))
        checks += [*_machine(params), *_room(study, needs)]
    missing = list(dict.fromkeys(check.what for check in checks if check.needed and not check.good))
    if as_json:
        content = {stage: {"memory_bytes": one.memory, "disk_bytes": one.disk} for stage, one in needs.items()}
        return json_text({"checks": list(map(asdict, checks)), "missing": missing, "needs": content}), not missing
    rows = [[check.what, "✓" if check.good else "✗", check.found, "" if check.good else check.todo] for check in checks]
    said = f"Missing: {', '.join(missing)}." if missing else "Nothing that is needed is missing."
    return f"{table(['what', '', 'found', 'what to do'], rows)}\n\n{said}", not missing


def _machine(params: Params) -> Iterator[Check]:
    """Show CPU and GPUs, and the device of the stages."""
    yield Check("cpu", True, f"{cores()} threads, {gigabytes(free_memory('cpu'))} of memory free")
    for gpu in accelerator.gpus():
        yield Check(gpu, True, f"{accelerator.full_name(gpu)}, {gigabytes(free_memory(gpu))} free")
    if params.runtime.ray is None:  # else the workers need it
        try:
            yield Check("runtime.device", True, str(own_device(params.runtime)))
        except UserError as error:
            yield Check("runtime.device", False, str(error), "change it in params.yaml")


def _room(study: Study, needs: dict[str, Requirements]) -> Iterator[Check]:
    """Check memory and disk for all stages."""
    if not needs:
        why = "" if is_there(study.model("dense")) else " before `dvc repro download-model`"
        for what, size in free(study).items():
            yield Check(what, True, f"{gigabytes(size)} free; needs: unknown{why}")
        return
    memory, disk = free(study).values()
    said = ", ".join(f"{stage} {gigabytes(one.memory)}" for stage, one in needs.items())
    enough = memory > max(one.memory for one in needs.values())
    todo = "free some, set `dtype` to the checkpoint's own, or take shorter windows"
    yield Check("memory", enough, f"{gigabytes(memory)} free; needs about: {said}", todo, needed=False)
    enough = disk > max(one.disk for one in needs.values())
    said = ", ".join(f"{stage} {gigabytes(one.disk)}" for stage, one in needs.items())
    todo = "free some; for example, `dvc exp remove NAME`, then `dvc gc --all-commits --all-experiments`"
    yield Check("disk", enough, f"{gigabytes(disk)} free; needs about: {said}", todo)
