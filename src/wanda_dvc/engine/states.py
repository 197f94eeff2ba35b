"""Hidden states between blocks, in files that survive a killed process, and the progress of a walk."""

import contextlib
import json
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from jaxtyping import Float
from torch import Tensor

CPU = torch.device("cpu")
SAVED_EVERY = 60  # seconds, if a GPU holds all rows
PROGRESS = "progress.json"


@dataclass
class HiddenStates:
    """The hidden states of all rows at the boundaries of blocks: boundary b is before block b, and after block b − 1.

    A shard has a file for each of the last `kept` boundaries. Reads go through a memory map, so hidden states cost page
    cache instead of memory. Files are not flushed, so after a power cut their content is undefined; checksums detect
    the damage.

    If the device has room for all rows, they also stay there; of two boundaries, files are then written once a minute
    and at the end: on a GPU, writing hidden states to disk takes longer than computing a block.
    """

    folder: Path
    lengths: Sequence[Sequence[int]]  # of the rows of each shard
    width: int
    dtype: torch.dtype
    kept: int = 2
    device: torch.device = CPU
    room: int = 0  # device memory for them in bytes
    _staying: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        tokens = sum(map(sum, self.lengths))
        self.stays = 0 < self.kept * tokens * self.width * self.dtype.itemsize <= self.room
        self.waits = self.stays and self.kept == 2  # with its files

    def read(self, boundary: int, shard: int) -> list[Float[Tensor, "_ width"]]:
        """Return the hidden states of a shard's rows: on the device, or views of a file."""
        if (boundary, shard) in self._staying:
            return self._staying[boundary, shard]
        lengths, path = self.lengths[shard], str(self._path(boundary, shard))
        mapped = torch.from_file(path, shared=True, size=sum(lengths) * self.width, dtype=self.dtype)
        return list(mapped.view(sum(lengths), self.width).split(list(lengths)))

    def write(self, boundary: int, shard: int, rows: Iterable[Float[Tensor, "_ width"]]) -> int:
        """Keep the hidden states of a shard's rows; return their checksum. OSError if the disk is full."""
        self._staying.pop((boundary - self.kept, shard), None)
        if self.stays:
            rows = self._staying[boundary, shard] = [row.to(self.device, self.dtype) for row in rows]
        return 0 if self.waits else self._save(boundary, shard, rows)

    def save(self, boundary: int) -> list[int]:
        """Write the files of a boundary that wait; return their checksums."""
        return [self._save(boundary, shard, self.read(boundary, shard)) for shard in range(len(self.lengths))]

    def drop(self, before: int) -> None:
        """Remove the files of earlier boundaries, and those of interrupted writes."""
        for path in self.folder.glob("*"):
            if path.suffix == ".part" or int(path.name.partition("-")[0]) < before:
                path.unlink(missing_ok=True)

    def checksum(self, boundary: int, shard: int) -> int | None:
        """Return the checksum of a file; None if it is missing or incomplete."""
        checksum = size = 0
        with contextlib.suppress(OSError), self._path(boundary, shard).open("rb") as file:
            while content := file.read(2**24):
                checksum, size = zlib.crc32(content, checksum), size + len(content)
        return checksum if size == sum(self.lengths[shard]) * self.width * self.dtype.itemsize else None

    def _save(self, boundary: int, shard: int, rows: Iterable[Tensor]) -> int:
        """Write a shard's file, and return its checksum. Another process may write the same bytes at the same time."""
        path, checksum = self._path(boundary, shard), 0
        if not self.waits:
            self._path(boundary - self.kept, shard).unlink(missing_ok=True)
        part = path.with_name(f"{path.name}-{uuid4().hex}.part")
        self.folder.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            for row in rows:
                content = row.to("cpu", self.dtype).contiguous().view(torch.uint8).numpy().data
                checksum = zlib.crc32(content, checksum)
                file.write(content)
        part.replace(path)
        return checksum

    def _path(self, boundary: int, shard: int) -> Path:
        return self.folder / f"{boundary:04d}-{shard:04d}"


@dataclass
class Progress:
    """The finished boundary of a walk's hidden states, in a file; −1 before the embeddings."""

    folder: Path
    streams: Mapping[str, HiddenStates]
    finished: int = -1
    not_finite: str | None = None  # the place of the first non-finite states
    _checksums: dict[str, dict[str, list[int]]] = field(default_factory=dict, init=False)  # by stream and boundary
    _saved: float = field(default_factory=time.monotonic, init=False)

    @classmethod
    def open(cls, folder: Path, streams: Mapping[str, HiddenStates], last: int) -> "Progress":
        """Return the progress of an interrupted run. It counts only with complete and unchanged hidden states."""
        progress, found = cls(folder, streams), load_progress(folder)
        with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError, AttributeError):
            finished, checksums = int(found["finished"]), {name: dict(found["checksums"][name]) for name in streams}
            complete = all(
                [states.checksum(boundary, shard) for shard in range(len(states.lengths))]
                == checksums[name][str(boundary)]
                for name, states in streams.items()
                for boundary in range(max(0, finished + 2 - states.kept), finished + 1)
            )
            if 0 <= finished <= last and complete:
                progress.finished, progress.not_finite, progress._checksums = finished, not_finite(folder), checksums
        return progress

    def restart(self) -> None:
        """Forget the finished boundary."""
        self.finished, self.not_finite, self._checksums = -1, None, {}

    def finish(self, checksums: Mapping[str, list[int]], *, last: bool = False) -> None:
        """Finish the next boundary, whose hidden states are written; keep the progress once all files are there."""
        self.finished += 1
        waiting = any(states.waits for states in self.streams.values())
        if waiting and not last and time.monotonic() - self._saved < SAVED_EVERY:
            return
        for name, states in self.streams.items():
            oldest = self.finished - states.kept + 2
            kept = {number: x for number, x in self._checksums.get(name, {}).items() if int(number) >= oldest}
            found = states.save(self.finished) if states.waits else checksums[name]
            self._checksums[name] = kept | {str(self.finished): found}
        self._saved = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / "progress.part"
        content = {"finished": self.finished, "checksums": self._checksums, "not_finite": self.not_finite}
        part.write_text(json.dumps(content), encoding="utf-8")
        part.replace(self.folder / PROGRESS)
        for states in self.streams.values():
            states.drop(self.finished - states.kept + 1)


def not_finite(work: Path) -> str | None:
    """Return the place of the first non-finite hidden states of a walk, or None."""
    found = load_progress(work).get("not_finite")
    return found if isinstance(found, str) else None


def load_progress(work: Path) -> dict[str, Any]:
    """Return the progress of an earlier run in `work`; empty if missing or of another format."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        progress = json.loads((work / PROGRESS).read_text(encoding="utf-8"))
        return progress if isinstance(progress, dict) else {}
    return {}
