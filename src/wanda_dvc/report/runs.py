"""The pipeline's runs, from the table of stages."""

from collections.abc import Sequence
from typing import NamedTuple

from wanda_dvc.stages import STAGES


class Run(NamedTuple):
    """One run of a stage."""

    stage: str
    own: bool  # its result depends on the method, so each row has a run of its own; rows may share the others


def runs(tasks: Sequence[str]) -> dict[str, Run]:
    """Every run by name, such as `zero-shot-pruned-piqa`, in the order of the pipeline."""
    found: dict[str, Run] = {}
    chosen = False  # whether a method has been chosen in this stage or before it
    for stage in STAGES.values():
        chosen = chosen or "method" in stage.settings
        found |= {name: Run(stage.name, chosen and part != "dense") for name, part in stage.runs()}
    return found
