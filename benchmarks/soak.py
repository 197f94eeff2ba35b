"""Run many experiments of a tiny model and watch that time and cache stay flat: python benchmarks/soak.py --count 200.

It writes `soak.json` after each experiment, and `soak.png` at the end; a run that was stopped goes on.
"""

import json
import resource
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from processes import HERE, Runner, say
from studies import QUICK, Studies

METHODS = ("wanda", "magnitude")
LISTED_EVERY = 10  # experiments between two timings of `wanda-dvc list`


def main(
    count: Annotated[int, typer.Option(help="Experiments.")] = 200,
    minutes: Annotated[float, typer.Option(help="Start no further experiment after so many.")] = 600,
    work: Annotated[Path, typer.Option(help="Where the study lies.")] = HERE / ".work" / "soak",
    target: Annotated[list[str] | None, typer.Option(help="Only up to these stages, such as apply.")] = None,
    output: Annotated[Path, typer.Option(help="The JSON; the picture is beside it.")] = HERE / "soak.json",
) -> None:
    """Run the experiments, one after the other, each with settings of its own."""
    target = target or []
    work.mkdir(parents=True, exist_ok=True)
    runner = Runner(work.resolve())
    study = Studies(runner, QUICK, None, None).under_dvc
    points: list[dict[str, Any]] = json.loads(output.read_text())["points"] if output.is_file() else []
    if not points:
        runner.run("git", "config", "user.email", "soak@example.org", cwd=study)
        runner.run("git", "config", "user.name", "soak", cwd=study)
        runner.run("dvc", "repro", *target, cwd=study)
        runner.run("git", "add", "--all", cwd=study)
        runner.run("git", "commit", "-q", "-m", "baseline", cwd=study)
    began = time.monotonic()
    while len(points) < count and time.monotonic() - began < 60 * minutes:
        number = len(points)
        method, sparsity = METHODS[number % 2], f"{(number // 2 + 1) / 1000 + 0.3:.3f}"
        words = ["--force", "--name", f"soak-{number}", "-S", f"method={method}", "-S", f"sparsity={sparsity}"]
        before = _processor_seconds()
        point = {"seconds": runner.run("dvc", "exp", "run", "-q", *words, *target, cwd=study)["wall"]}
        point["processor"] = _processor_seconds() - before
        point |= {"cache": _size(study / ".dvc/cache"), "temporary": _size(study / ".dvc/tmp")}
        point |= {"git": _size(study / ".git")}
        if number % LISTED_EVERY == 0:
            point["list"] = runner.run("wanda-dvc", "list", cwd=study)["wall"]
        points.append(point)
        summary = _summary(points)
        output.write_text(json.dumps(summary | {"points": points}, indent=1) + "\n", encoding="utf-8")
        say(f"{number}: {point['seconds']:.1f} s, cache {point['cache'] / 1e6:.2f} MB")
    _draw(points, output.with_suffix(".png"))
    typer.echo(json.dumps(_summary(points), indent=1))


def _summary(points: list[dict[str, Any]]) -> dict[str, Any]:
    """The first and the last quarter beside each other: median seconds, and bytes added by an experiment."""
    quarter = max(1, len(points) // 4)
    first, last = points[:quarter], points[-quarter:]
    found: dict[str, Any] = {"experiments": len(points)}
    for name, part in (("first_quarter", first), ("last_quarter", last)):
        found[name] = {
            f"{kind}_an_experiment": round(statistics.median(point[kind] for point in part), 2)
            for kind in ("seconds", "processor")
        }
        for where in ("cache", "temporary", "git"):
            grown = part[-1][where] - part[0][where]
            found[name][f"{where}_bytes_an_experiment"] = round(grown / max(1, len(part) - 1))
    return found


def _processor_seconds() -> float:
    """Processor seconds of all processes so far, those that they started included: other jobs do not add to them."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def _draw(points: list[dict[str, Any]], target: Path) -> None:
    """Draw seconds and megabytes against the number of the experiment."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    spent = [point["processor"] for point in points]  # by the clock it also says how busy the machine was
    left.plot(spent, ".", markersize=3, color="#1f77b4", label="dvc exp run, processor")
    listed = {number: point["list"] for number, point in enumerate(points) if "list" in point}
    left.plot(list(listed), list(listed.values()), "x", markersize=4, color="#d62728", label="wanda-dvc list, clock")
    left.set(ylim=(0, None), xlabel="experiment", ylabel="seconds", title="Time")
    left.legend()
    for where, colour in (("cache", "#1f77b4"), ("git", "#d62728"), ("temporary", "#2ca02c")):
        right.plot([point[where] / 1e6 for point in points], color=colour, label=where)
    right.set(ylim=(0, None), xlabel="experiment", ylabel="MB", title="Disk")
    right.legend()
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    typer.run(main)
