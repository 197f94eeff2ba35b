"""Documents of a gzipped text, read one at a time."""

import gzip
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from wanda_dvc.errors import UserError
from wanda_dvc.reading import check_file, parse_json


@dataclass(frozen=True)
class Documents(Sequence[str]):
    """The documents of a gzipped file of JSON lines, read one at a time by index.

    Gzip has no random access, so the lines are unpacked once to a scratch file. Only their offsets are in memory.
    """

    lines: IO[bytes]
    starts: "array[int]"  # offsets, and the end of the last document
    column: str
    shard: Path

    @classmethod
    def unpack(cls, shard: Path, column: str, scratch: IO[bytes]) -> "Documents":
        """Unpack a shard into a scratch file. UserError if the shard is damaged."""
        starts, blank = array("q", [0]), 0
        check_file(shard)
        try:
            with gzip.open(shard) as packed:
                for line in packed:
                    scratch.write(line)
                    starts.append(starts[-1] + len(line))
                    blank = 0 if line.strip() else blank + 1
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{shard}: damaged ({error}), expected lines of JSON, gzipped; fetch it again") from None
        return cls(scratch, starts[: len(starts) - blank], column, shard)  # blank lines at the end are no documents

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override] # no slices
        begin, end = self.starts[index], self.starts[index + 1]
        self.lines.seek(begin)
        where = f"{self.shard}: line {index + 1}"
        row = parse_json(self.lines.read(end - begin), where)
        if isinstance(row, dict) and isinstance(document := row.get(self.column), str):
            return document
        raise UserError(f"{where}: no text `{self.column}`, expected one in every line; copy it again")
