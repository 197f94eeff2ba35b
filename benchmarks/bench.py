"""Measure this project against the published procedure, stock lm-eval, and the machine's own floor.

    make bench                                  everything, about 40 minutes on two quiet cores
    make bench ROWS="mask perplexity"           some rows; the others of the last result stay
    make bench ROWS=7b                          a shape of 7B under 3 GB, as root; writes results-7b.*
    python benchmarks/bench.py --quick          a tiny random model, to try the harness; writes results-quick.*
    python benchmarks/bench.py --resume         go on after an interruption, with what was measured
    python benchmarks/bench.py --mirror DIR     WikiText-2 and the real benchmarks, 200 items a task

A figure is the wall time of a whole process started for it, or the stage's own clock where a row says "inside". A row
may use what another row measures; each thing is measured once a run. The speed of a shared machine changes within
minutes, so the floor is measured before and after a long process, and a baseline's time is scaled to the speed that the
machine had for ours.
"""

import argparse
import os
import platform
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path

import ours
import psutil
from measures import Bench
from processes import HERE, Part, Runner, say
from results import Result, write
from rows import ASKED, NAMES, ROWS
from studies import FULL, QUICK, Studies


def machine(studies: Studies) -> Part:
    """Return what the results are of: the machine, the libraries, the model, the text and the tasks."""
    return {
        "cpu": ours.processor(),
        "cores": os.cpu_count(),
        "bf16_units": ours.has_bf16_units(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "lm-eval", "dvc")},
        "model": studies.given.name if studies.given else "as params.yaml has it",
        "text": "WikiText-2" if studies.mirror else "embedded",
        "tasks": f"benchmarks, {studies.sizes.limit} items a task" if studies.mirror else "samples, 48 items a task",
        "quick": studies.quick,
    }


def measure(studies: Studies, names: list[str], target: Path) -> dict[str, str]:
    """Measure the rows of some names (of all, if none is given), write the results after each, return what failed."""
    bench, about = Bench(studies), machine(studies)
    results: list[Result] = []
    failed: dict[str, str] = {}
    for row in (*ROWS, *ASKED):
        if (row.name not in names if names else row in ASKED) or row.name in failed:
            continue
        try:
            result = row.result(bench)
        except RuntimeError as error:  # the rows of other names are measured all the same
            failed[row.name] = str(error)
            say(f"{row.name}: failed: {error}")
        else:
            results.append(result)
            say(f"{result.name}: ratio {result.ratio}, goal {result.goal}, {result.met}")
        write(target, about, results, failed)
    return failed


def main() -> None:
    """Run the command line; exit 1 if a row could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(NAMES)}; by default all but 7b")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--resume", action="store_true")
    mirror = os.environ.get("WANDA_DVC_MIRROR")
    parser.add_argument("--mirror", type=Path, default=Path(mirror) if mirror else None)
    parser.add_argument("--model", type=Path, help="a directory of safetensors instead of params.yaml's model")
    parser.add_argument("--work", type=Path, default=HERE / ".work")
    words = parser.parse_args()
    if unknown := set(words.rows) - set(NAMES):
        parser.error(f"got {', '.join(sorted(unknown))}, expected {', '.join(NAMES)}")
    work: Path = words.work.resolve() / ("quick" if words.quick else "full")
    if not words.resume:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    studies = Studies(Runner(work), QUICK if words.quick else FULL, words.mirror, words.model)
    asked = all(name in {row.name for row in ASKED} for name in words.rows or [""])
    target = HERE / ("results-quick" if words.quick else "results-7b" if asked else "results")
    began = time.perf_counter()
    failed = measure(studies, words.rows, target)
    say(f"done in {(time.perf_counter() - began) / 60:.1f} min; benchmarks/{target.name}.md")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
