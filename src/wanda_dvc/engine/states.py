"""The hidden states of a walk and its progress, in files that survive a killed process."""

import contextlib
import itertools
import json
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

CPU = torch.device("cpu")
SAVED_EVERY = 60  # seconds, if a GPU holds all rows


@dataclass
class HiddenStates:
    """The hidden states of all rows before and after the current block, in two files that swap roles.

    Reads go through a memory map, so hidden states cost page cache instead of memory, and survive a killed process.
    Writes use `write`: a full disk raises an error, and no page is faulted in. Files are not flushed, so after a power
    cut their content is undefined; a checksum detects the damage.

    Rows stay on the device as long as there is room, the shortest first. If all rows fit, the files are written once a
    minute and at the end: on a GPU, writing hidden states to disk takes longer than computing a block.
    """

    folder: Path
    lengths: list[int]  # of the rows
    width: int
    dtype: torch.dtype
    blocks: int
    finished: int = -1  # finished blocks; −1: before the embeddings
    not_finite: str | None = None  # the place of the first non-finite states
    device: torch.device = CPU
    room: int = 0  # device memory for them in bytes, before and after a block together
    _file: int = field(default=1, init=False)  # of the states before the current block, if they are in a file
    _before: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)  # rows that stay on the device
    _after: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)
    _saved: float = field(default_factory=time.monotonic, init=False, repr=False)
    _checksums: list[int] = field(default_factory=lambda: [0], init=False, repr=False)  # up to each row

    @classmethod
    def open(
        cls, folder: Path, lengths: list[int], width: int, dtype: torch.dtype, blocks: int, **room: Any
    ) -> "HiddenStates":
        """Open the states in a folder, with the finished blocks of an interrupted run.

        Progress counts only with complete and unchanged states. `room` sets `device` and `room`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        states = cls(folder, lengths, width, dtype, blocks, **room)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, OverflowError):
            progress = load_progress(folder)
            finished = int(progress["finished"])
            if 0 <= finished <= blocks:
                states._file = int(bool(progress["file"]))
                checksum, size = _checksum_of(states._path(states._file))
                if (checksum, size) == (progress["checksum"], sum(lengths) * width * dtype.itemsize):
                    states.finished, states.not_finite = finished, not_finite(folder)
        return states

    @cached_property
    def stay(self) -> frozenset[int]:
        """Return the rows on the device: the shortest, as long as there is room."""
        by_length = sorted(range(len(self.lengths)), key=self.lengths.__getitem__)
        ends = itertools.accumulate(2 * self.lengths[row] * self.width * self.dtype.itemsize for row in by_length)
        return frozenset(row for row, end in zip(by_length, ends, strict=True) if end <= self.room)

    @property
    def before(self) -> list[Float[Tensor, "length width"]]:
        """Yield the hidden states of each row before the current block."""
        return self._rows(self._file, self._before, range(len(self.lengths)))

    def after(self, rows: range) -> list[Float[Tensor, "length width"]]:
        """Return the hidden states of some rows after the current block, once written."""
        return self._rows(1 - self._file, self._after, rows)

    def write(self, rows: Iterable[Float[Tensor, "length width"]], *, first: int = 0) -> None:
        """Keep the hidden states after the current block, from one row on. OSError if the disk is full."""
        if self._all_stay:
            self._after |= {number: row.to(self.device, self.dtype) for number, row in enumerate(rows, first)}
        else:
            self._save(self._staying(rows, first), first)

    def finish_block(self) -> None:
        """Finish the current block: its output states become the next block's input states."""
        self.finished += 1
        self._before, self._after = self._after, {}
        if self._all_stay:
            if self.finished < self.blocks and time.monotonic() - self._saved < SAVED_EVERY:
                return
            self._save(self._before[number] for number in range(len(self.lengths)))
            self._saved = time.monotonic()
        self._file = 1 - self._file
        part = self.folder / "progress.part"
        progress: dict[str, int | str] = {
            "finished": self.finished,
            "file": self._file,
            "checksum": self._checksums[-1],
        }
        if self.not_finite:
            progress["not_finite"] = self.not_finite
        part.write_text(json.dumps(progress), encoding="utf-8")
        part.replace(self.folder / "progress.json")

    @property
    def _all_stay(self) -> bool:
        return len(self.stay) == len(self.lengths) > 0

    def _staying(self, rows: Iterable[Tensor], first: int) -> Iterator[Tensor]:
        """Yield the rows, and keep the rows that stay on the device."""
        for number, row in enumerate(rows, first):
            if number in self.stay:
                self._after[number] = row.to(self.device, self.dtype)
            yield row

    def _save(self, rows: Iterable[Tensor], first: int = 0) -> None:
        """Write hidden states after the current block to their file, from one row on."""
        path = self._path(1 - self._file)
        path.touch()
        if first == 0:
            self._checksums = [0]
        del self._checksums[first + 1 :]  # of rows that are written again
        with path.open("r+b") as file:  # overwrites in place, so that the disk space stays allocated
            file.seek(sum(self.lengths[:first]) * self.width * self.dtype.itemsize)
            for row in rows:
                content = row.to("cpu", self.dtype).contiguous().view(torch.uint8).numpy().data
                self._checksums.append(zlib.crc32(content, self._checksums[-1]))
                file.write(content)
            file.truncate()

    def _path(self, file: int) -> Path:
        return self.folder / f"hidden_{file}.bin"

    def _rows(self, file: int, staying: dict[int, Tensor], rows: range) -> list[Float[Tensor, "length width"]]:
        """Return some rows, from the device or through the map of a file."""
        if all(row in staying for row in rows):
            return [staying[row] for row in rows]
        lengths = self.lengths[: rows.stop]
        tokens = sum(lengths)
        mapped = torch.from_file(str(self._path(file)), shared=True, size=tokens * self.width, dtype=self.dtype)
        waiting = mapped.view(tokens, self.width).split(lengths)
        return [staying.get(row, waiting[row]) for row in rows]


@dataclass
class ShardStates:
    """The hidden states of a shard before and after a block, in memory: a task's input and output."""

    before: list[Float[Tensor, "_ width"]]
    not_finite: str | None = None
    _after: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def after(self, rows: range) -> list[Float[Tensor, "_ width"]]:
        """Return the hidden states of some rows after the block, once written."""
        return [self._after[row] for row in rows]

    def write(self, rows: Iterable[Float[Tensor, "_ width"]], *, first: int = 0) -> None:
        """Keep the hidden states after the block, from one row on."""
        self._after |= {number: row.cpu() for number, row in enumerate(rows, first)}


def not_finite(work: Path) -> str | None:
    """Return the place of the first non-finite hidden states of a walk, or None."""
    found = load_progress(work).get("not_finite")
    return found if isinstance(found, str) else None


def load_progress(work: Path) -> dict[str, Any]:
    """Return the progress of an earlier run in `work`; empty if missing or of another format."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        progress = json.loads((work / "progress.json").read_text(encoding="utf-8"))
        return progress if isinstance(progress, dict) else {}
    return {}


def _checksum_of(path: Path) -> tuple[int, int]:
    """Return the checksum and the size of a file."""
    checksum = size = 0
    with path.open("rb") as file:
        while content := file.read(2**24):
            checksum, size = zlib.crc32(content, checksum), size + len(content)
    return checksum, size
