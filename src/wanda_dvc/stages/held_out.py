"""Measures the loss of a few held-out calibration windows with and without each choice of the recipe.

A group, an allocation or a reconstruction may help one model and harm another. No evaluation window is used.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING

from torch import Tensor

from wanda_dvc.catalog import methods
from wanda_dvc.engine.checkpoint import Checkpoint
from wanda_dvc.engine.rows import Row
from wanda_dvc.errors import UserError, notice
from wanda_dvc.plan import WINDOWS_HELD_OUT, Plan
from wanda_dvc.stages.inputs import calibration_windows, check_text, open_decoder
from wanda_dvc.stages.mask import informed, keeps, read_share
from wanda_dvc.stages.running import solving_device
from wanda_dvc.study.files import Json, finite
from wanda_dvc.study.held_out import raised
from wanda_dvc.study.project import Project
from wanda_dvc.study.provenance import read_provenance

if TYPE_CHECKING:
    from pathlib import Path

    from wanda_dvc.engine.decoder import Decoder
    from wanda_dvc.engine.runner import Change, Changes

WINDOWS = "WANDA_DVC_HELD_OUT"  # sets the number of windows; 0: no comparison
Losses = dict[str, dict[str, float | str]]  # of masks and of weights, by choice, in nats a token
Solved = Callable[[int], Mapping[str, Tensor]]  # a block's weights after a reconstruction


def compare(project: Project, made_from: Json, windows: int, reconstructed: Callable[[str], Solved]) -> Losses:
    """Return the losses of the plans in `Plan.compared` on some windows; {} without choices to compare.

    models/pruned is made from `made_from`. Masks are compared without a reconstruction, by Wanda's scores if a solver
    computes them. `reconstructed` returns a study's weights after a reconstruction, given its name.
    """
    made = read_provenance(project.masks, "mask")
    plan = Plan.of_masks(made["params"], made_from["reconstruction"])
    if not (windows and plan.compared):
        return {}
    todo = "`dvc repro`, or `wanda-dvc calibrate` and `wanda-dvc mask`"
    check_text(project, made["calibration"]["text"], "masks/: calibrated on", todo)
    rows = [Row(tokens) for tokens in calibration_windows(project, made["calibration"], held_out=windows)]
    if not rows:
        notice("apply: the calibration text has no held-out windows; the choices of the recipe were not compared")
        return {}

    def candidate(part: str, other: Plan) -> tuple[str, "Changes"]:
        """Return the model of a plan, and the changes of its blocks."""
        if part == "masks":
            return "dense", _masks(project, other, made)
        if other == plan:
            return "pruned", lambda _: ({}, {})
        solved = reconstructed(other.reconstruction.name)
        return "dense", lambda block: ({}, solved(block))

    found, dtype = Losses(), made["calibration"]["dtype"]
    with project.work(made_from | {"kind": "held-out", "windows": len(rows)}) as work:
        for part, plans in plan.compared.items():
            found[part] = {}
            for number, (choice, other) in enumerate(plans.items()):
                model, changes = candidate(part, other)
                decoder = open_decoder(project, model, dtype=dtype)
                found[part][choice] = _loss(decoder, rows, changes, work.path / f"{part}-{number}")
        work.forget()
    for problem in raised({"held_out": found}):
        notice(f"apply: {problem}")
    return found


def limit() -> int:
    """Return the number of windows. UserError if the environment variable is not a number."""
    asked = os.environ.get(WINDOWS, str(WINDOWS_HELD_OUT))
    if not asked.isdecimal():
        raise UserError(f"{WINDOWS}: got {asked}, expected a number of windows; 0 disables the comparison")
    return int(asked)


def _masks(project: Project, plan: Plan, made: Json) -> "Changes":
    """Return the masks of a plan, with the shares in the provenance of masks/ if it is uneven."""
    checkpoint, device = Checkpoint(project.model("dense")), solving_device(project.params.runtime)
    if plan.method.competition == "solver":
        plan = replace(plan, method=methods()["wanda"])

    def change(block: int) -> "Change":
        measured = informed(project, plan, block)
        share = plan.share if plan.allocation.name == "uniform" else read_share(made["sparsities"][block])
        return keeps(plan, checkpoint.weight, measured, share, device=device), {}

    return change


def _loss(decoder: "Decoder", rows: list[Row], changes: "Changes", folder: "Path") -> float | str:
    """Return the mean loss of rows, in nats a token, with changed blocks. A killed run resumes in `folder`."""
    # They import transformers, which takes seconds, and most recipes have nothing to compare.
    from wanda_dvc.engine.losses import window_losses
    from wanda_dvc.engine.walk import outputs, walk

    for step in walk(decoder, rows, folder):
        step.change(*changes(step.index))
    return finite(round(fmean(window_losses(decoder, rows, outputs(decoder, rows, folder), 0)), 4))
