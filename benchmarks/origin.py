"""Where figures come from: files of rows, each with its value, and the code, libraries, machine and date behind it.

A file is `{"rows": {NAME: {"value": …, "origin": …}}}`, one row a line. An origin is what `origin` returns. A row is
old when the code that it names has changed.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from code_digest import sources_digest

from wanda_dvc.machine import cores
from wanda_dvc.study.files import write_text
from wanda_dvc.study.scaffold import changed

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LIBRARIES = ("torch", "transformers")
FLAGS = {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}  # of a processor, which decide how it multiplies

Row = dict[str, Any]


def origin(protocol: str, stages: Iterable[str] = (), libraries: Iterable[str] = LIBRARIES) -> Row:
    """Return the origin of what is measured now: how, with which code, which libraries, on which machine, and when.

    Results depend on the code of some `stages`; times and memory on all code, without `stages`.
    """
    names = list(stages)
    return {
        "protocol": protocol,
        "commit": _git("rev-parse", "--short=12", "HEAD") + ("+" if _git("status", "--porcelain", "src") else ""),
        "stages": names,
        "sources": sources_digest(tuple(names)),
        "libraries": {name: version(name) for name in libraries} | {"python": sys.version.split()[0]},
        "cpu": f"{processor()}, {cores()} threads",
        "date": time.strftime("%Y-%m-%d"),
    }


def processor() -> str:
    """Return the CPU's name, and on Linux its family, its model and what it can multiply with."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
        entries = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        if {"model name", "cpu family", "model", "flags"} <= entries.keys():  # not on ARM
            flags = sorted(FLAGS & set(entries["flags"].split()))
            family = f"family {entries['cpu family']} model {entries['model']}"
            return ", ".join([entries["model name"], family, " ".join(flags)])
    return platform.processor() or platform.machine()


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def read_rows(path: Path) -> dict[str, Row]:
    """Return the rows of a file by name; none if there is no file."""
    rows: dict[str, Row] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else {}
    return rows


def write_row(path: Path, name: str, value: Any, made: Row) -> None:
    """Add a row to a file, or replace it; the file is complete at any moment."""
    rows = read_rows(path) | {name: {"value": value, "origin": made}}
    lines = (f"{json.dumps(key)}: {json.dumps(row, ensure_ascii=False)}" for key, row in rows.items())
    write_text(path, '{"rows": {\n' + ",\n".join(lines) + "\n}}\n")


def change_settings(path: Path, changes: dict[str, Any]) -> None:
    """Set nested settings in a params.yaml, which keeps its comments."""
    write_text(path, changed(path.read_text(encoding="utf-8"), changes)[1])


def arguments(description: str | None, work: str) -> argparse.ArgumentParser:
    """Return the command line of a script that measures rows, with the options that all of them have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mirror", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", default=[], help="words of a row's name")
    # Outside the clone: DVC refuses a repository in a folder that git ignores.
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "wanda-dvc" / work)
    return parser


def process(*words: str | Path, cwd: Path) -> float:
    """Run a command of this environment with this code; return its wall seconds. `wanda-dvc` has a clock."""
    path = (str(HERE / "bin"), str(Path(sys.executable).parent), os.environ["PATH"])
    env = {"PYTHONPATH": str(ROOT / "src"), "PATH": ":".join(path)}
    began, run = time.perf_counter(), list(map(str, words))
    pipes: Row = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    done = subprocess.run(run, cwd=cwd, env=os.environ | env, check=False, **pipes)
    wall = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"{' '.join(run)}: exit {done.returncode}: {done.stdout[-500:]}")
    return wall


def protocol(windows: int, measured: int, length: int, *texts: str) -> Row:
    """Return the settings of the windows of WikiText-2 that calibrate, and of the texts' windows that are measured."""
    calibration = {"text": {"source": "wikitext2", "split": "validation"}, "windows": windows, "length": length}
    perplexity = {"texts": {text: {"source": text} for text in texts}, "windows": measured, "length": length}
    return {"calibration": calibration, "perplexity": perplexity}


def is_old(row: Row) -> bool:
    """Whether the code that can change a row has changed since it was measured, or is not known."""
    return bool(row["origin"].get("sources") != sources_digest(tuple(row["origin"]["stages"])))
