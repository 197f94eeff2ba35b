"""The results of a run: whether goals are met, and the files `results.json` and `results.md`."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from processes import Part
from tabulate import tabulate

HEAD = """\
# Benchmarks

Made by `make bench`; what the words mean is in `benchmarks/bench.py`. (a) is a plain implementation of the \
published procedure (`plain.py`), (b) stock lm-eval (`stock.py`), the floor the machine's own matrix \
multiplication (`floor.py`)."""
UNITS = "not measured: this CPU has no bf16 units"


@dataclass(frozen=True)
class Measured:
    """What a row's function returns. `ratio` is compared with the row's goal."""

    ratio: float
    ours_s: float | None = None
    baseline_s: float | None = None  # or the floor
    note: str = ""
    holds: bool = True  # what must be true besides the goal


@dataclass(frozen=True)
class Result:
    """A row as it is kept. `met` is None where this machine can't measure it."""

    name: str
    ours_s: float | None
    baseline_s: float | None
    ratio: float | None
    goal: str
    met: bool | None
    note: str = ""


def judge(name: str, goal: str, found: Measured) -> Result:
    """Return the result of a row whose goal is `≥ 2`, `< 0.05`, `< 1 s`, or `0`."""
    sign, _, bound = goal.partition(" ")
    if not bound:
        met = found.ratio == float(sign)
    else:
        limit = float(bound.removesuffix(" s"))
        met = found.ratio >= limit if sign == "≥" else found.ratio < limit
    ours, baseline = (None if value is None else round(value, 3) for value in (found.ours_s, found.baseline_s))
    return Result(name, ours, baseline, round(found.ratio, 4), goal, met and found.holds, found.note)


def without_units(name: str, goal: str) -> Result:
    """Return the result of a row in bfloat16 on a CPU that computes it many times slower than float32."""
    return Result(name, None, None, None, goal, None, UNITS)


def write(target: Path, about: Part, results: list[Result], failed: dict[str, str]) -> None:
    """Write TARGET.json and TARGET.md, with the other rows of the last run if it was on the same machine."""
    together = [*_kept(target.with_suffix(".json"), about, results), *results]
    content = {"machine": about, "rows": [asdict(result) for result in together]}
    target.with_suffix(".json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    target.with_suffix(".md").write_text(page(about, together, failed), encoding="utf-8")


def _kept(path: Path, about: Part, results: list[Result]) -> list[Result]:
    """Return the results of the last run that this one does not replace."""
    if not path.is_file():
        return []
    last = json.loads(path.read_text(encoding="utf-8"))
    if last["machine"] != about:
        return []
    new = {result.name for result in results}
    return [Result(**row) for row in last["rows"] if row["name"] not in new]


def page(about: Part, results: list[Result], failed: dict[str, str]) -> str:
    """Return results.md."""
    machine = ", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in about.items())
    met, missed, unknown = (sum(result.met is value for result in results) for value in (True, False, None))
    counts = f"{met} goals met, {missed} missed, {unknown} that this machine can't tell."
    lines = [HEAD, "", f"{machine}.", "", table(results), "", counts]
    lines += [f"Failed: {name}: {why}" for name, why in failed.items()]
    return "\n".join(lines) + "\n"


def table(results: list[Result]) -> str:
    """Return the results as a Markdown table."""
    headers = ["what", "ours, s", "baseline or floor, s", "ratio", "goal", "met", "how"]
    met = {True: "yes", False: "**no**", None: "–"}
    lines = [
        [
            result.name,
            _seconds(result.ours_s),
            _seconds(result.baseline_s),
            _ratio(result),
            _goal(result.goal),
            met[result.met],
            result.note,
        ]
        for result in results
    ]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def _ratio(result: Result) -> str:
    if result.ratio is None:
        return "–"
    if result.goal.split()[-1].startswith("0."):
        return f"{100 * result.ratio:.1f} %"
    return f"{result.ratio:.2f}" + (" s" if result.goal.endswith(" s") else "")


def _goal(goal: str) -> str:
    sign, _, bound = goal.partition(" ")
    return f"{sign} {100 * float(bound):g} %" if bound.startswith("0.") else goal
