"""The chapter on what the rows took: seconds by stage, each run counted once."""

from wanda_dvc.report import charts
from wanda_dvc.report.formatting import DASH, seconds
from wanda_dvc.report.pages import Content, Table, Text, literal, picture
from wanda_dvc.report.runs import runs
from wanda_dvc.report.section import Section
from wanda_dvc.stages import STAGES
from wanda_dvc.study.times import machine_of

SHARED = "shared by the rows"


def content(section: Section) -> Content:
    """The table and the picture; a sentence if no times are known."""
    bars = _bars(section)
    if not bars:
        return [Text("No times are at hand.")]
    used = [stage for stage in STAGES if any(stage in bar for bar in bars.values())]
    table = [
        [literal(label), *(seconds(bar[stage]) if stage in bar else DASH for stage in used), seconds(sum(bar.values()))]
        for label, bar in bars.items()
    ]
    all_of = {stage: sum(bar.get(stage, 0.0) for bar in bars.values()) for stage in used}
    table.append(["all", *(seconds(all_of[stage]) for stage in used), seconds(sum(all_of.values()))])
    machines = sorted({machine_of(time) for row in section.rows for time in row.times().values()})
    caption = (
        "Seconds by stage, each run counted once; of a stage that was killed and resumed, those since it resumed. "
        f"Measured on {literal('; '.join(machines))}."
    )
    return [
        Table(caption, ["", *used, "all"], table),
        picture(
            section.prefix + "time",
            "Time by stage",
            "What the rows share (downloads, calibration, the dense model's evaluation) was paid once.",
            charts.times(bars, used),
        ),
    ]


def _bars(section: Section) -> dict[str, dict[str, float]]:
    """Seconds by stage, for each row and for the runs that rows share."""
    bars: dict[str, dict[str, float]] = {SHARED: {}}
    known, seen = runs(section.tasks), set()
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
