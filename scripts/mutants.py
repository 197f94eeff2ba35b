"""Break the numeric core, one change at a time in a scratch copy, and list the changes that no test notices.

    python scripts/mutants.py                      every mutant, an hour or two
    python scripts/mutants.py pruning/solvers      those of a file

mutants.json has of each file the tests that concern it, and the changes: old text, which is there once, and new text. A
mutant is killed if one of these tests fails or takes ten minutes. Exit 1 if more than one of twenty survives.
"""

import contextlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path("src/wanda_dvc")
LONGEST = 600  # seconds a mutant

TABLE = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def copy(target: Path) -> None:
    """Copy all files that git tracks."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, target / name)


def mutated(source: str, old: str, new: str) -> str:
    """Return source text with one change. ValueError unless the old text is there once."""
    if source.count(old) != 1:
        raise ValueError(f"found {source.count(old)} times, expected once: {old}")
    return source.replace(old, new)


def run_tests(root: Path, tests: str) -> None:
    """Run some tests of the copy in this process, and exit with pytest's status."""
    import pytest

    os.chdir(root)
    sys.path[:0] = [str(root / "src")]
    words = [f"tests/test_{name}.py" for name in tests.split()]
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        options = ["-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    status = pytest.main([*options, "-m", "not full and not slow and not pipeline", *words])
    specs = {name: getattr(module, "__spec__", None) for name, module in sys.modules.items()}
    others = [name for name, spec in specs.items() if spec and not str(spec.origin).startswith(str(root))]
    (root / "libraries.json").write_text(json.dumps(others))
    os._exit(int(status))


def survives(root: Path, tests: str) -> bool:
    """Whether all tests pass. They run in a fork, which need not import the libraries of an earlier one again."""
    known = root / "libraries.json"
    for name in json.loads(known.read_text()) if known.is_file() else ["torch", "transformers"]:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    process = get_context("fork").Process(target=run_tests, args=(root, tests))
    process.start()
    process.join(LONGEST)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode == 0


def main(files: list[str]) -> int:
    """Run the mutants of some files, by default of all."""
    survivors, count = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        copy(root)
        for name in files or TABLE:
            tests, changes = TABLE[name]["tests"], TABLE[name]["changes"]
            path = root / PACKAGE / f"{name}.py"
            source = path.read_text(encoding="utf-8")
            if not survives(root, tests):
                raise SystemExit(f"{name}: {tests} fail without a change; mend them first")
            for old, new in changes:
                began = time.perf_counter()
                path.write_text(mutated(source, old, new), encoding="utf-8")
                alive = survives(root, tests)
                count, survivors = count + 1, survivors + alive
                took = f"{time.perf_counter() - began:.0f} s"
                print(f"{'SURVIVED' if alive else 'killed'} {took:>6} {name}: {old!r} → {new!r}", flush=True)
            path.write_text(source, encoding="utf-8")
    print(f"{survivors} of {count} mutants survived")
    return survivors > count / 20


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
