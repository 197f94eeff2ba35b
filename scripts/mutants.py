"""Break the numeric core, one change at a time in a copy of git's index, and list the changes that no test notices.

    python scripts/mutants.py                      every mutant, an hour or two
    python scripts/mutants.py pruning/solvers      those of a file

mutants.json has of each file the tests that concern it, their marks if not those of `make test`, and the changes: old
text, which is there once, and new text. A mutant is killed if one of these tests fails or takes ten minutes. Exit 1 if
more than one of twenty survives.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def mutated(source: str, old: str, new: str) -> str:
    """Return source text with one change. ValueError unless the old text is there once."""
    if source.count(old) != 1:
        raise ValueError(f"found {source.count(old)} times, expected once: {old}")
    return source.replace(old, new)


def survives(root: Path, tests: str, marks: str) -> bool:
    """Whether all tests pass."""
    words = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider"]
    words += ["-m", marks, *(f"tests/test_{name}.py" for name in tests.split())]
    env = os.environ | {"PYTHONPATH": str(root / "src")}
    with contextlib.suppress(subprocess.SubprocessError):
        return bool(subprocess.run(words, cwd=root, env=env, capture_output=True, check=True, timeout=600))
    return False


def main(files: list[str]) -> int:
    """Run the mutants of some files, by default of all."""
    survivors, count = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        subprocess.run(["git", "checkout-index", "--all", f"--prefix={root}/"], cwd=ROOT, check=True)
        for name in files or TABLE:
            tests, changes = TABLE[name]["tests"], TABLE[name]["changes"]
            marks = TABLE[name].get("marks", "not full and not slow and not pipeline")
            path = root / f"src/wanda_dvc/{name}.py"
            source = path.read_text(encoding="utf-8")
            if not survives(root, tests, marks):
                raise SystemExit(f"{name}: {tests} fail without a change; mend them first")
            for old, new in changes:
                path.write_text(mutated(source, old, new), encoding="utf-8")
                alive = survives(root, tests, marks)
                count, survivors = count + 1, survivors + alive
                print(f"{'SURVIVED' if alive else 'killed  '} {name}: {old!r} → {new!r}", flush=True)
            path.write_text(source, encoding="utf-8")
    print(f"{survivors} of {count} mutants survived")
    return survivors > count / 20


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
