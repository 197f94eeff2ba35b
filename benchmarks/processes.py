"""Run processes that are timed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import typer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

Part = dict[str, Any]  # what was measured, as JSON holds it


def say(text: str) -> None:
    """Print a line with the time of day."""
    typer.echo(f"[{time.strftime('%H:%M:%S')}] {text}")


class Runner:
    """Runs processes in a work folder; the last one's output is `last.log` there."""

    def __init__(self, work: Path) -> None:
        self.work = work

    def run(self, *words: str | Path, cwd: Path | None = None) -> Part:
        """Run a process and return its wall seconds and its peak resident memory.

        Raises:
            RuntimeError: the process failed; the message ends with its last lines.
        """
        log = self.work / "last.log"
        with log.open("wb") as out:
            began = time.perf_counter()
            process = subprocess.Popen(
                list(map(str, words)), cwd=cwd or self.work, env=_environment(), stdout=out, stderr=out
            )
            try:
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:
                process.kill()
                raise
            wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            last = log.read_text(errors="replace").splitlines()[-5:]
            raise RuntimeError(f"{' '.join(map(str, words))}: exit {process.returncode}: {' | '.join(last)}")
        scale = 1 if sys.platform == "darwin" else 1024
        return {"wall": wall, "peak_gb": usage.ru_maxrss * scale / 1e9}

    def script(self, name: str, *words: str | Path) -> Part:
        """Run a script of this folder in its own process and return its result, with time and memory as of `run`."""
        result = self.work / "result.json"
        result.unlink(missing_ok=True)
        done = self.run(sys.executable, HERE / f"{name}.py", *words, "--result", result)
        return json.loads(result.read_text()) | done


def _environment() -> dict[str, str]:
    """Return the environment of a process: no network, this Python's commands, this checkout's wanda_dvc."""
    env = os.environ | {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), env.get("PYTHONPATH")]))
    return env
