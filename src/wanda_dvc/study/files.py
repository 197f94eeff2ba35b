"""Writes JSON and CSV through temporary files and renames, and makes copies that share blocks."""

import csv
import io
import json
import math
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from wanda_dvc.errors import UserError
from wanda_dvc.reading import DIVERGED, is_there, name_of, read_object

Json = dict[str, Any]


def write_json(path: Path, content: object) -> None:
    """Write JSON to a temporary file, then rename it. Readers never see half a file, and a link's target stays."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def finite(number: float) -> float | str:
    """Return a number, or `diverged` for one that JSON does not have."""
    return number if math.isfinite(number) else DIVERGED


def json_text(content: object) -> str:
    """Return JSON to print. ValueError where a number is not finite: JSON has no such number."""
    return json.dumps(content, indent=2, allow_nan=False)


def write_text(path: Path, text: str) -> None:
    """Write text to a temporary file, then rename it, as `write_json` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_csv(path: Path, headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write CSV as `write_json` does. Floats have six significant digits, because later ones vary by machine."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(headers)
    writer.writerows([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows)
    write_text(path, text.getvalue())


def load_json(path: Path) -> Json:
    """Read a JSON object; return an empty one if the file is missing."""
    return read_object(path, "run the stage that writes it again") if is_there(path) else {}


def load_numbers(path: Path) -> Json:
    """Read a file of metrics; return an empty object if it is missing. UserError if a value is no number."""
    content = load_json(path)
    _check_numbers(content, str(path))
    return content


def _check_numbers(content: Json, where: str) -> None:
    for name, value in content.items():
        if isinstance(value, dict):
            _check_numbers(value, f"{where}: {name}")
        elif value != DIVERGED and not (isinstance(value, (int, float)) and math.isfinite(value)):
            raise UserError(
                f"{where}: {name}: found {name_of(value)}, expected a number; run the stage that writes it again"
            )


def copy_file(source: Path, target: Path) -> None:
    """Copy a file to a new place: a reflink where the file system supports it, else its bytes.

    A reflink shares the blocks of the original until either file changes, so it takes no space. A hard link would
    expose the user's own file: DVC makes cached files read-only, and users overwrite their files in place.
    """
    from dvc_objects.fs import system  # its import takes a fifth of a second

    try:
        system.reflink(source, target)
    except OSError:
        shutil.copyfile(source, target)
    else:
        target.chmod(target.stat().st_mode | 0o200)  # macOS clones the permissions too


def link_file(source: Path, target: Path) -> None:
    """Give a read-only file a second name: a hard link, or a copy on another file system."""
    try:
        target.hardlink_to(source)
    except OSError:
        copy_file(source, target)
