"""The activations before each block, on disk or on the GPU, and the progress of a forward pass."""

import contextlib
import json
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

# --- hidden states, and the progress of a walk ---

SAVED_EVERY = 60  # seconds, if a GPU holds all rows
PROGRESS = "progress.json"
CHECKSUM = 4  # bytes, at the end of a file


@dataclass
class ActivationStore:
    """The hidden states of all rows at the boundaries of blocks: boundary b is before block b, and after block b − 1.

    A shard has a file for each of the last `kept` boundaries. Reads go through a memory map, so hidden states cost page
    cache instead of memory. Files are not flushed, so after a power cut their content is undefined; a checksum at the
    end of each file detects the damage.

    If the device has room for all rows, they also stay there; of two boundaries, files are then written once a minute
    and at the end: on a GPU, writing hidden states to disk takes longer than computing a block.
    """

    folder: Path
    lengths: Sequence[Sequence[int]]  # of the rows of each shard
    width: int
    dtype: torch.dtype
    kept: int
    device: torch.device
    memory_budget: int  # device memory for them in bytes
    _staying: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        tokens = sum(map(sum, self.lengths))
        self.on_device = 0 < self.kept * tokens * self.width * self.dtype.itemsize <= self.memory_budget
        self.written_later = self.on_device and self.kept == 2  # with its files

    def read(self, boundary: int, shard: int) -> list[Float[Tensor, "_ width"]]:
        """Return the hidden states of a shard's rows: on the device, or views of a file."""
        if (boundary, shard) in self._staying:
            return self._staying[boundary, shard]
        lengths, path = self.lengths[shard], str(self._path(boundary, shard))
        mapped = torch.from_file(path, shared=True, size=sum(lengths) * self.width, dtype=self.dtype)
        return list(mapped.view(sum(lengths), self.width).split(list(lengths)))

    def write(self, boundary: int, shard: int, rows: Iterable[Float[Tensor, "_ width"]]) -> None:
        """Keep the hidden states of a shard's rows. OSError if the disk is full."""
        self._staying.pop((boundary - self.kept, shard), None)
        if self.on_device:
            rows = self._staying[boundary, shard] = [row.to(self.device, self.dtype) for row in rows]
        if not self.written_later:
            self._save(boundary, shard, rows)

    def finish(self, boundary: int) -> None:
        """Write the files of a boundary that wait."""
        for shard in range(len(self.lengths)) if self.written_later else ():
            self._save(boundary, shard, self.read(boundary, shard))

    def drop(self, boundary: int) -> None:
        """Remove the files that the next block does not need after a boundary, and those of interrupted writes."""
        for path in self.folder.glob("*"):
            if path.suffix == ".part" or int(path.name.partition("-")[0]) < boundary - self.kept + 2:
                path.unlink(missing_ok=True)

    def is_complete(self, boundary: int) -> bool:
        """Whether all files up to a boundary are there and unchanged."""
        boundaries = range(max(0, boundary - self.kept + 2), boundary + 1)
        return all(self._is_complete(each, shard) for each in boundaries for shard in range(len(self.lengths)))

    def _is_complete(self, boundary: int, shard: int) -> bool:
        try:
            content: Any = np.memmap(self._path(boundary, shard), np.uint8, "r")
        except (OSError, ValueError):  # missing, or empty
            return False
        size = sum(self.lengths[shard]) * self.width * self.dtype.itemsize
        checksum = zlib.crc32(content[:size]).to_bytes(CHECKSUM, "little")
        return len(content) == size + CHECKSUM and checksum == content[size:].tobytes()

    def _save(self, boundary: int, shard: int, rows: Iterable[Tensor]) -> None:
        """Write a shard's file. Another process may write the same bytes at the same time."""
        path, checksum = self._path(boundary, shard), 0
        part = path.with_name(f"{path.name}-{uuid4().hex}.part")
        self.folder.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            for row in rows:
                content = row.to("cpu", self.dtype).contiguous().view(torch.uint8).numpy().data
                checksum = zlib.crc32(content, checksum)
                file.write(content)
            file.write(checksum.to_bytes(CHECKSUM, "little"))
        part.replace(path)

    def _path(self, boundary: int, shard: int) -> Path:
        return self.folder / f"{boundary:04d}-{shard:04d}"


class PassProgress:
    """The finished boundary of a walk's hidden states, in a file; −1 before the embeddings."""

    def __init__(self, folder: Path, streams: Sequence[ActivationStore], last: int) -> None:
        """Read an interrupted run's progress, if it ended at `last` or before and its hidden states are unchanged."""
        self.folder, self.streams, self.finished, self._saved = folder, streams, -1, time.monotonic()
        self.not_finite: str | None = None  # the first block with non-finite states
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            found = json.loads((folder / PROGRESS).read_bytes())
            if 0 <= found["finished"] <= last and all(states.is_complete(found["finished"]) for states in streams):
                self.finished, self.not_finite = found["finished"], found["not_finite"]

    def finish(self, *, last: bool = False) -> None:
        """Finish the next boundary, whose hidden states are written; keep the progress once all files are there."""
        self.finished += 1
        if (
            any(states.written_later for states in self.streams)
            and not last
            and time.monotonic() - self._saved < SAVED_EVERY
        ):
            return
        for states in self.streams:
            states.finish(self.finished)
        self._saved = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / "progress.part"
        part.write_text(json.dumps({"finished": self.finished, "not_finite": self.not_finite}), encoding="utf-8")
        part.replace(self.folder / PROGRESS)
        for states in self.streams:
            states.drop(self.finished)
