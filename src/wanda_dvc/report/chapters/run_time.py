"""The chapter on run time: seconds by stage, each run counted once."""

from collections.abc import Iterable

from wanda_dvc.report.formatting import DASH, seconds
from wanda_dvc.report.pages import Content, table
from wanda_dvc.report.section import Section
from wanda_dvc.stages import STAGES
from wanda_dvc.study.markup import inline
from wanda_dvc.study.times import machine_of

SHARED = "shared by the rows"


def content(section: Section) -> Content:
    """The table; a sentence if no times are known."""
    bars = _bars(section)
    if not bars:
        return ["No times are known."]
    used = [stage for stage in STAGES if any(stage in bar for bar in bars.values())]
    every = {stage: sum(bar.get(stage, 0.0) for bar in bars.values()) for stage in used}
    rows = [
        [inline(label), *(seconds(bar[stage]) if stage in bar else DASH for stage in used), seconds(sum(bar.values()))]
        for label, bar in [*bars.items(), ("all", every)]
    ]
    machines = sorted({machine_of(time) for row in section.rows for time in row.times().values()})
    caption = (
        "Seconds by stage. Shared runs (downloads, calibration, the dense model's evaluation) count once; an "
        f"interrupted stage counts from its last resume. Measured on {inline('; '.join(machines))}."
    )
    return [table(caption, ["", *used, "all"], rows)]


def runs(texts: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Return by run, such as `zero-shot-pruned`, its stage, and whether each row has a separate run.

    Runs are separate if the result depends on the recipe; rows may share the other runs.
    """
    found: dict[str, tuple[str, bool]] = {}
    chosen = False  # whether this stage or an earlier stage depends on the recipe
    for stage in STAGES.values():
        chosen = chosen or "recipe" in stage.settings
        found |= {name: (stage.name, chosen and part != "dense") for name, part, _ in stage.runs(texts)}
    return found


def _bars(section: Section) -> dict[str, dict[str, float]]:
    """Return seconds by stage, for each row and for shared runs."""
    bars: dict[str, dict[str, float]] = {SHARED: {}}
    known, seen = runs(section.texts), set()
    for row in section.ordered:
        own = bars[section.label(row)] = {}
        for run, time in row.times().items():
            stage, is_own = known[run]
            if not is_own and (run, time["key"]) in seen:
                continue
            seen.add((run, time["key"]))
            bar = own if is_own else bars[SHARED]
            bar[stage] = bar.get(stage, 0.0) + time["seconds"]
    return {label: bar for label, bar in bars.items() if bar}
