"""JSON and CSV on disk, each written beside its place and renamed: a reader never sees half a file."""

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from wanda_dvc.errors import UserError

Json = dict[str, Any]


def write_json(path: Path, content: object) -> None:
    """Write beside its place and rename: a reader never sees half a file, a link's target is never touched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    beside.replace(path)


def write_csv(path: Path, headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write as `write_json` does. Floats have six significant digits: later ones differ between machines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    with beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(headers)
        writer.writerows([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows)
    beside.replace(path)


def read_json(path: Path, made_by: str) -> Any:
    """Read an artifact's JSON. UserError naming the command that makes it, if it isn't there or isn't ours."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not there; run `dvc repro` or `wanda-dvc {made_by}` first") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON ({error}); run `wanda-dvc {made_by}` again") from None


def load_json(path: Path) -> Json:
    """Read a JSON object; an empty one where the file is not there."""
    content: Json = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content
