"""Documents of a gzipped text, read one at a time."""

import gzip
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, overload

from wanda_dvc.errors import UserError


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
        starts = array("q", [0])
        try:
            with gzip.open(shard) as packed:
                for line in packed:
                    scratch.write(line)
                    starts.append(starts[-1] + len(line))
        except (OSError, EOFError) as error:
            raise UserError(f"{shard}: damaged ({error}), expected lines of JSON, gzipped; fetch it again") from None
        return cls(scratch, starts, column, shard)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        begin, end = self.starts[index], self.starts[index + 1]
        self.lines.seek(begin)
        try:
            document = json.loads(self.lines.read(end - begin))[self.column]
            if isinstance(document, str):
                return document
        except (ValueError, KeyError, TypeError):
            pass
        raise UserError(f"{self.shard}: line {index + 1}: no text `{self.column}`, expected one in every line")
