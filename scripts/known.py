"""Add the digests of what `wanda-dvc init` writes, and has written at any commit: python scripts/known.py.

`wanda-dvc init --upgrade` replaces only what nobody has edited: a stage, plot or file whose digest is in known.json.
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

from ruamel.yaml import YAML

from wanda_dvc.study.provenance import digest
from wanda_dvc.study.scaffold import FILES, PIPELINE
from wanda_dvc.study.upgrade import SECTIONS

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "src/wanda_dvc/study/template/known.json"


def digests(place: str, text: str) -> Iterator[str]:
    """Yield the digests of one file that has been shipped."""
    if place != PIPELINE:
        yield digest(text)
        return
    content = YAML(typ="safe", pure=True).load(text)
    for section in SECTIONS:
        entries = content.get(section) or {}
        for entry in entries.values() if isinstance(entries, dict) else entries:
            yield digest(entry)


def shipped() -> Iterator[str]:
    """Yield the digests of what is shipped now."""
    for place, file in FILES.items():
        if place == PIPELINE or place.startswith(".dvc/plots/"):
            yield from digests(place, file.read_text(encoding="utf-8"))


def committed() -> Iterator[str]:
    """Yield the digests of every committed version, in the repository's own copies."""
    for place in (PIPELINE, *(name for name in FILES if name.startswith(".dvc/plots/"))):
        for commit in _git("log", "--format=%h", "--", place).split():
            if _git("ls-tree", commit, place):
                yield from digests(place, _git("show", f"{commit}:{place}"))


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    earlier = json.loads(TARGET.read_text(encoding="utf-8")) if TARGET.exists() else []
    TARGET.write_text(json.dumps(sorted({*earlier, *shipped(), *committed()}), indent=0) + "\n", encoding="utf-8")
