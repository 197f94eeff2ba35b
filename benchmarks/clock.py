"""`wanda-dvc` with a clock, for benchmarks: `benchmarks/bin/wanda-dvc`, which `origin.process` puts first on the PATH.

It times each run of a stage inside its process: its function and the import of its libraries, without the start of the
command. A file of the study holds the seconds of each run's last time.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from wanda_dvc import cli
from wanda_dvc.stages import run
from wanda_dvc.study.files import load_json, write_json
from wanda_dvc.study.folder import Study

FOLDER = ".dvc/tmp/seconds"


def seconds(root: Path) -> dict[str, float]:
    """Return the seconds of the last run of each stage of a study, by run."""
    return {path.stem: load_json(path)["seconds"] for path in (root / FOLDER).glob("*.json")}


def run_timed(
    stage: str,
    *,
    study: Study,
    context: Callable[[str], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    **words: str,
) -> None:
    """Run a stage as `run` does, and write its seconds."""

    @contextlib.contextmanager
    def clocked(run_name: str) -> Iterator[None]:
        with context(run_name):
            began = time.perf_counter()
            yield
            write_json(study.root / FOLDER / f"{run_name}.json", {"seconds": round(time.perf_counter() - began, 2)})

    run(stage, study=study, context=clocked, **words)


if __name__ == "__main__":
    vars(cli)["run_stage"] = run_timed
    cli.run()
