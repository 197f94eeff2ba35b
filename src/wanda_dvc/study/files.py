"""Files of a study: JSON and CSV through temporary files and renames, documents."""

import csv
import gzip
import io
import json
import math
import zlib
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from wanda_dvc.errors import UserError
from wanda_dvc.reading import DIVERGED, check_file, is_there, parse_json, read_object

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


class Documents(Sequence[str]):
    """The documents of a gzipped file of JSON lines, read one at a time by index. UserError if the file is damaged.

    Gzip has no random access, so the lines are unpacked once to a scratch file. Only their offsets are in memory.
    """

    def __init__(self, shard: Path, column: str, scratch: IO[bytes]) -> None:
        self.starts = array("q", [0])  # and the end of the last
        check_file(shard)
        try:
            with gzip.open(shard) as packed:
                for line in packed:
                    scratch.write(line)
                    self.starts.append(self.starts[-1] + len(line))
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{shard}: damaged ({error}), expected lines of JSON, gzipped; fetch it again") from None
        self.shard, self.column, self.lines = shard, column, scratch

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override] # no slices
        begin, end = self.starts[index], self.starts[index + 1]
        self.lines.seek(begin)
        where = f"{self.shard}: line {index + 1}"
        return text_in(parse_json(self.lines.read(end - begin), where), self.column, where)
