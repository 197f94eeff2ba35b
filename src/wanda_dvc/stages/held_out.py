"""Measures the loss of a few held-out calibration windows with and without each choice of the recipe.

A group, an allocation or a reconstruction may help one model and harm another. No evaluation window is used.
"""

import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from statistics import fmean
from typing import TYPE_CHECKING

from torch import Tensor

from wanda_dvc.catalog import methods
from wanda_dvc.engine.checkpoint import Checkpoint
from wanda_dvc.engine.rows import Row
from wanda_dvc.errors import UserError, notice
from wanda_dvc.plan import WINDOWS_HELD_OUT
from wanda_dvc.pruning.choose import choose_block, targets_of
from wanda_dvc.stages.inputs import held_out_windows, open_decoder, with_fisher
from wanda_dvc.stages.running import solving_device
from wanda_dvc.study.files import Json
from wanda_dvc.study.held_out import raised
from wanda_dvc.study.project import Project
from wanda_dvc.study.provenance import digest, read_provenance
from wanda_dvc.study.tensors import read_stats

if TYPE_CHECKING:
    from pathlib import Path

    from wanda_dvc.engine.decoder import Decoder
    from wanda_dvc.engine.runner import Changes

WINDOWS = "WANDA_DVC_HELD_OUT"  # sets the number of windows; 0: no comparison
Candidates = Mapping[str, tuple[str, "Changes"]]  # by choice: the model, and the changes of its blocks
Losses = dict[str, dict[str, float]]  # of "masks" and of "weights", by choice, in nats a token


def compare(project: Project, weights: Candidates) -> Losses:
    """Return the loss of two windows with and without each choice; {} without choices.

    Two neighbours in the result differ by one choice. Masks are compared without a reconstruction, by Wanda's scores
    if a solver computes them. `weights` are candidates on the masks of the study.
    """
    made, windows = read_provenance(project.masks, "mask"), limit()
    compared = {
        part: candidates
        for part, candidates in (("masks", _masks(project, made)), ("weights", weights))
        if windows and len(candidates) > 1
    }
    if not compared:
        return {}
    rows = [Row(tokens) for tokens in held_out_windows(project, made["calibration"], windows)]
    if not rows:
        notice("apply: the calibration text has no held-out windows; the choices of the recipe were not compared")
        return {}
    found = Losses()
    dtype, choices = made["calibration"]["dtype"], {part: list(candidates) for part, candidates in compared.items()}
    made_from = {"kind": "held-out", "masks": digest(made), "choices": choices, "windows": len(rows)}
    with project.work(made_from) as work:
        for part, candidates in compared.items():
            found[part] = {
                choice: _loss(open_decoder(project, model, dtype=dtype), rows, changes, work.path / f"{part}-{number}")
                for number, (choice, (model, changes)) in enumerate(candidates.items())
            }
        work.forget()
    for problem in raised({"held_out": found}):
        notice(f"apply: {problem}")
    return found


def limit() -> int:
    """Return the number of windows. UserError if the environment variable is not a number."""
    asked = os.environ.get(WINDOWS, str(WINDOWS_HELD_OUT))
    if not asked.isdecimal():
        raise UserError(f"{WINDOWS}: got {asked}, expected a number of windows; 0 turns the comparison off")
    return int(asked)


def _masks(project: Project, made: Json) -> Candidates:
    """Return the masks to compare: uniform by row, then with one more choice each."""
    params, checkpoint = made["params"], Checkpoint(project.model("dense"))
    method = methods()[params["method"]]
    method = methods()["wanda"] if method.competition == "solver" else method
    device = solving_device(project.params.runtime)
    uniform: Sequence[object] = [params["sparsity"]] * made["blocks"]

    def by(group: str, shares: Sequence[object]) -> tuple[str, "Changes"]:
        def change(block: int) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
            measured = read_stats(project.stats, block)
            measured = with_fisher(project, block, measured) if group == "fisher" else measured
            given = shares[block]
            own = {name: Fraction(x) for name, x in given.items()} if isinstance(given, dict) else Fraction(str(given))
            targets = targets_of(measured, share=own, pattern=params["pattern"], group=group)
            return choose_block(checkpoint.weight, measured, method=method, targets=targets, device=device), {}

        return "dense", change

    group = params["group"] if params["group"] == "fisher" else "row"
    candidates = {"uniform": by("row" if group == "fisher" else params["group"], uniform)}
    if group == "fisher":
        candidates["group fisher"] = by(group, uniform)
    if params["allocation"] != "uniform":
        candidates[f"allocation {params['allocation']}"] = by(params["group"], made["sparsities"])
    return candidates


def _loss(decoder: "Decoder", rows: list[Row], changes: "Changes", folder: "Path") -> float:
    """Return the mean loss of rows, in nats a token, with changed blocks. A killed run resumes in `folder`."""
    # They import transformers, which takes seconds, and most recipes have nothing to compare.
    from wanda_dvc.engine.losses import window_losses
    from wanda_dvc.engine.walk import outputs, walk

    for step in walk(decoder, rows, folder):
        step.advance()
        step.change(*changes(step.index))
    return round(fmean(window_losses(decoder, rows, outputs(decoder, rows, folder), 0)), 4)
