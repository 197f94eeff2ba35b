"""The hidden states of a walk, and the progress beside them: files that survive a killed process."""

import contextlib
import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass
class HiddenStates:
    """The hidden states of all rows before and after the block at work, in two files that take turns.

    They are read through a memory map, so they cost page cache instead of memory, and they survive a killed process.
    They are written with `write`: a full disk is an error then, and no page is faulted in. After a crash of the
    machine their content is undefined, so they are used again only within the same boot.
    """

    folder: Path
    lengths: list[int]  # of the rows
    width: int
    dtype: torch.dtype
    blocks: int
    finished: int = -1  # blocks done; −1: not even the embeddings
    not_finite: str | None = None  # where they first were not
    _checksums: list[int] = field(default_factory=lambda: [0], init=False, repr=False)  # up to each row being written

    @classmethod
    def open(cls, folder: Path, lengths: list[int], width: int, dtype: torch.dtype, blocks: int) -> "HiddenStates":
        """The states in a folder, with as many finished blocks as a killed run of this boot left.

        Progress counts only with the states that it speaks of, whole and unchanged.
        """
        folder.mkdir(parents=True, exist_ok=True)
        states = cls(folder, lengths, width, dtype, blocks)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, OverflowError):
            progress = load_progress(folder)
            finished = int(progress["finished"])
            if progress["boot"] == _boot() and 0 <= finished <= blocks:
                checksum, size = _checksum_of(states._path(finished))
                if (checksum, size) == (progress["checksum"], sum(lengths) * width * dtype.itemsize):
                    states.finished, states.not_finite = finished, not_finite(folder)
        return states

    @property
    def before(self) -> list[Float[Tensor, "length width"]]:
        """The hidden states of each row before the block at work."""
        return self._map(self.finished)

    def after(self, rows: range) -> list[Float[Tensor, "length width"]]:
        """The hidden states of some rows after the block at work, once they are written."""
        return self._map(self.finished + 1, rows.stop)[rows.start :]

    def write(self, rows: Iterable[Float[Tensor, "length width"]], *, first: int = 0) -> None:
        """Write the hidden states after the block at work, from one row on. OSError where the disk is full."""
        path = self._path(self.finished + 1)
        path.touch()
        if first == 0:
            self._checksums = [0]
        del self._checksums[first + 1 :]  # of rows that are written again
        with path.open("r+b") as file:  # overwrites in place: the space on the disk stays allocated
            file.seek(sum(self.lengths[:first]) * self.width * self.dtype.itemsize)
            for row in rows:
                content = row.to("cpu", self.dtype).contiguous().view(torch.uint8).numpy().data
                self._checksums.append(zlib.crc32(content, self._checksums[-1]))
                file.write(content)
            file.truncate()

    def turn(self) -> None:
        """Finish the block at work: the states after it are those before the next."""
        self.finished += 1
        beside = self.folder / "progress.part"
        progress = {"finished": self.finished, "boot": _boot(), "checksum": self._checksums[-1]}
        if self.not_finite:
            progress["not_finite"] = self.not_finite
        beside.write_text(json.dumps(progress), encoding="utf-8")
        beside.replace(self.folder / "progress.json")

    def _path(self, turn: int) -> Path:
        return self.folder / f"hidden_{turn % 2}.bin"

    def _map(self, turn: int, rows: int | None = None) -> list[Float[Tensor, "length width"]]:
        lengths = self.lengths[:rows]
        tokens = sum(lengths)
        states = torch.from_file(str(self._path(turn)), shared=True, size=tokens * self.width, dtype=self.dtype)
        return list(states.view(tokens, self.width).split(lengths))


def not_finite(work: Path) -> str | None:
    """Where a walk's hidden states first were not finite; None where they all are."""
    found = load_progress(work).get("not_finite")
    return found if isinstance(found, str) else None


def load_progress(work: Path) -> dict[str, Any]:
    """The progress that a run left in `work`; none where it is not there, or not ours."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        progress = json.loads((work / "progress.json").read_text(encoding="utf-8"))
        return progress if isinstance(progress, dict) else {}
    return {}


def _checksum_of(path: Path) -> tuple[int, int]:
    """The checksum and the size of a file."""
    checksum = size = 0
    with path.open("rb") as file:
        while content := file.read(2**24):
            checksum, size = zlib.crc32(content, checksum), size + len(content)
    return checksum, size


def _boot() -> str | None:
    """This boot of this machine, where the system tells."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
