"""Fail if a figure of the default study has moved since the last commit: python scripts/moved.py, after `make repro`.

Perplexity, divergence and agreement may differ by 0.5 %, because processors round differently. An accuracy may differ
by one item. `dvc metrics diff` finds what differs at all.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wanda_dvc.study.folder import Study

ROOT = Path(__file__).resolve().parents[1]
SHARE = 0.005


def moved(differences: dict[str, dict[str, Any]], items: int) -> Iterator[str]:
    """Yield each figure that has moved, of the differences that DVC found by file and name."""
    for file, figures in differences.items():
        for name, figure in figures.items():
            old, new = figure.get("old"), figure.get("new")
            if isinstance(old, int | float) and isinstance(new, int | float):
                # Accuracies have few digits: one item more or less, and their rounding.
                allowed = 1.01 / items if file.endswith("zero_shot.json") else SHARE * abs(old)
                if abs(new - old) <= allowed:
                    continue
            yield f"{file}: {name}: committed {old}, now {new}"


def main() -> int:
    """Run the command line."""
    words = [sys.executable, "-m", "dvc", "metrics", "diff", "--json"]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    differences = json.loads(found.stdout)
    lines = list(moved(differences, Study(ROOT).params.items or sys.maxsize))
    print("\n".join(lines) or f"no figure has moved; differences: {json.dumps(differences)}")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
