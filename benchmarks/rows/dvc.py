"""Rows of what DVC takes, and of a further sparsity, pattern or method under it."""

import shutil
from typing import Any

from measures import Bench
from processes import Part
from results import Measured

FURTHER: dict[str, dict[str, Any]] = {
    "70 %": {"sparsity": 0.7},
    "2:4": {"sparsity": 0.5, "pattern": "2:4"},
    "magnitude": {"sparsity": 0.5, "pattern": "unstructured", "method": "magnitude"},
}
DEFAULT = {"sparsity": 0.5, "pattern": "unstructured", "method": "wanda"}


def nothing_to_do(bench: Bench) -> Measured:
    """`dvc repro` where every result is there."""
    bench.full_repro()
    again = bench.part("dvc repro, nothing to do", lambda: {"walls": [_repro_again(bench) for _ in range(3)]})
    seconds = round(min(again["walls"]), 2)
    return Measured(seconds, seconds, note="best of three")


def _repro_again(bench: Bench) -> float:
    done = bench.studies.repro()
    if done["ran"]:
        raise RuntimeError(f"dvc repro ran {done['ran']} commands again, expected none")
    return float(done["wall"])


def further(bench: Bench, key: str) -> Measured:
    """The slowest further experiment against (a); `key` is `inside` the stages, or the `wall` of `dvc repro`."""
    plain = bench.plain("wanda")["wall"]
    bench.part("dvc repro apply", lambda: bench.studies.repro("apply"))
    found = bench.part("further", lambda: _further(bench))
    slowest = max(done[key] for done in found.values())
    each = ", ".join(f"{what} {done[key]:.2f} s" for what, done in found.items())
    return Measured(plain / slowest, slowest, plain, f"the slowest of {each}")


def _further(bench: Bench) -> Part:
    """Measure each experiment of `FURTHER`, and go back to the default that other rows expect."""
    folder = bench.studies.under_dvc
    shutil.rmtree(folder / ".dvc/cache/runs", ignore_errors=True)  # an interrupted run may have answered some
    found = {}
    for name, change in FURTHER.items():
        bench.studies.settings(folder, change)
        done = bench.studies.repro("apply")
        if done["ran"] != 2:
            raise RuntimeError(f"{name}: dvc ran {done['ran']} commands, expected mask and apply")
        found[name] = {"wall": done["wall"], "inside": done["inside"]}
    bench.studies.settings(folder, DEFAULT)
    bench.studies.repro("apply")
    return found
