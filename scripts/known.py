"""Add the digests of the files that `wanda-dvc init` writes, now and at any commit: python scripts/known.py.

`wanda-dvc init --upgrade` replaces a file whose digest is in known.json, because nobody has edited the file. A release
also copies its pipeline.yaml and params.yaml into template/earlier/, as a base for merging edited files.
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

from wanda_dvc.study.provenance import digest
from wanda_dvc.study.scaffold import FILES, PIPELINE

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "src/wanda_dvc/study/template/known.json"
PLACES = [place for place in FILES if place == PIPELINE or place.startswith(".dvc/plots/")]


def shipped() -> Iterator[str]:
    """Yield the digests of the files that are shipped now."""
    for place in PLACES:
        yield digest(FILES[place].read_text(encoding="utf-8"))


def committed() -> Iterator[str]:
    """Yield the digests of every committed version, in the repository's own copies."""
    for place in PLACES:
        for commit in _git("log", "--format=%h", "--", place).split():
            if _git("ls-tree", commit, place):
                yield digest(_git("show", f"{commit}:{place}"))


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    earlier = json.loads(TARGET.read_text(encoding="utf-8")) if TARGET.exists() else []
    TARGET.write_text(json.dumps(sorted({*earlier, *shipped(), *committed()}), indent=0) + "\n", encoding="utf-8")
