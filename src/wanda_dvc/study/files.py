"""Files of a study: JSON and CSV through temporary files and renames, documents."""

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from wanda_dvc.errors import UserError, explain, reason
from wanda_dvc.reading import DIVERGED, is_there, read_object

Json = dict[str, Any]


def write_json(path: Path, content: object) -> None:
    """Write JSON to a temporary file, then rename it. Readers never see half a file, and a link's target stays."""
    write_text(path, json_text(content) + "\n")


def json_number(number: float) -> float | str:
    """Return a number, or `diverged` for one that JSON does not have."""
    return number if math.isfinite(number) else DIVERGED


def json_text(content: object) -> str:
    """Return JSON, as files and commands have it. ValueError where a number is not finite: JSON has no such number."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)


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


def text_in(row: Json, column: str, where: str) -> str:
    """Return the text in a column of a row. UserError if the row has none."""
    text = row.get(column)
    if not isinstance(text, str):
        columns = ", ".join(row) or "nothing"
        raise UserError(f"{where}: found {columns:.200}, expected text in column `{column}`; name another")
    return text


def open_documents(file: Path, column: str, sha256: str) -> Sequence[str]:
    """Return the documents in a column of a gzipped file of JSON lines, each read when it is taken.

    `datasets` unpacks the file once, into its cache. UserError if the file is damaged, or has no such texts.
    """
    from datasets import Value, load_dataset

    try:
        # By the name of its content: `datasets` knows a file by its path and time alone.
        rows: Any = load_dataset("json", sha256, data_files=str(file), split="train")
    except Exception as error:  # pyarrow and `datasets` raise exceptions of many classes
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error  # `datasets` hides the reason
        if explain(cause):
            raise cause from None
        problem = f"damaged ({reason(cause)}), expected lines of JSON, gzipped; fetch it again"
        raise UserError(f"{file}: {problem}") from error
    if rows.features.get(column) != Value("string") or rows.data.column(column).null_count:
        text_in(dict.fromkeys(rows.features), column, str(file))  # UserError
    documents: Sequence[str] = rows[column]
    return documents
