"""The activations before each block, on disk or on the GPU, and the progress of a pass through the blocks."""

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from wanda_dvc.engine.accelerator import Copies, use_on_host
from wanda_dvc.engine.sequences import Batch, Hidden, States

SAVED_EVERY = 60  # seconds, if a GPU holds all sequences
PROGRESS = "progress.json"
OUTPUT_HEAD = "output head"  # named in place of a block if only the results after the last block are not finite
# An id that changes with each start of this machine; empty if the system has none (macOS).
BOOT_FILE = Path("/proc/sys/kernel/random/boot_id")
BOOT_ID = BOOT_FILE.read_text(encoding="ascii").strip() if BOOT_FILE.exists() else ""


@dataclass
class ActivationStore:
    """The activations of all sequences before some blocks: the `kept` newest. Those after block b are before b + 1.

    A file holds the activations of one chunk before one block, [tokens, width]; reads map it into memory. Files are
    not flushed to the disk. They outlive a killed process, but no power cut: `PassProgress` trusts them until a boot.

    If the activations fit the memory budget of a GPU, they also stay there (`on_device`). If `kept` is 1 too, their
    files are written once a minute and after the last block (`written_later`), because to write them takes longer than
    to compute a block.
    """

    folder: Path
    lengths: Sequence[Sequence[int]]  # of the sequences of each chunk
    width: int
    dtype: torch.dtype
    kept: int  # the number of blocks whose activations are kept; one more while the newest are written
    device: torch.device
    memory_budget: int  # device memory for activations, in bytes
    _in_memory: dict[tuple[int, int], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        need = (self.kept + 1) * sum(map(sum, self.lengths)) * self.width * self.dtype.itemsize
        self.on_device = 0 < need <= self.memory_budget
        self.written_later = self.on_device and self.kept == 1

    def read(self, block: int, chunk: int) -> Hidden:
        """Return the activations of a chunk's sequences before a block: on the device, or views of a file."""
        return self._content(block, chunk).split(list(self.lengths[chunk]))

    def read_batches(self, block: int, chunk: int, batches: Sequence[Batch], copies: Copies) -> Iterator[States]:
        """Yield the activations of a chunk's batches before a block, on the device of `copies`."""
        sizes = [len(batch) * len(batch[0].tokens) for batch in batches]
        parts = self._content(block, chunk).split(sizes)
        on_device = parts if (block, chunk) in self._in_memory else copies.to_device(parts)
        for batch, states in zip(batches, on_device, strict=True):
            yield states.view(len(batch), -1, self.width)

    def write(self, block: int, chunk: int, batches: Iterable[Float[Tensor, "*batch length width"]]) -> None:
        """Store the activations of a chunk's sequences before a block. OSError if the disk is full."""
        # With kept=1, those before block 4 follow from those before block 3, so nothing reads those before block 2.
        self._in_memory.pop((block - self.kept - 1, chunk), None)  # `drop` removes their file
        if self.on_device:
            content = torch.cat([x.to(self.device, self.dtype).flatten(0, -2) for x in batches])
            self._in_memory[block, chunk], batches = content, [content]
        if not self.written_later:
            self._save(block, chunk, batches)

    def copy_from(self, store: "ActivationStore", source_block: int, block: int) -> None:
        """Copy a store's activations before one block to this store, before another block."""
        for chunk in range(len(self.lengths)):
            self.write(block, chunk, store.read(source_block, chunk))

    def flush(self, block: int) -> None:
        """Write the files of the activations before a block that are not written yet."""
        if self.written_later:
            for chunk in range(len(self.lengths)):
                self._save(block, chunk, [self._content(block, chunk)])

    def drop(self, block: int) -> None:
        """Remove interrupted writes, and files that are not kept once the activations before a block are complete."""
        for path in self.folder.glob("[0-9]*-[0-9]*.bin*"):
            if path.suffix == ".part" or int(path.name.partition("-")[0]) <= block - self.kept:
                path.unlink(missing_ok=True)  # a worker that a cluster took for dead may still write it

    def is_complete(self, block: int) -> bool:
        """Whether the files of all kept blocks up to a block have the right size. OSError if one is missing."""
        for kept in range(max(0, block - self.kept + 1), block + 1):
            for chunk, lengths in enumerate(self.lengths):
                if self._path(kept, chunk).stat().st_size != sum(lengths) * self.width * self.dtype.itemsize:
                    return False
        return True

    def _content(self, block: int, chunk: int) -> Float[Tensor, "tokens width"]:
        if (block, chunk) in self._in_memory:
            return self._in_memory[block, chunk]
        content = np.memmap(self._path(block, chunk), np.uint8, "c")  # writable, as torch demands, but not the file
        return torch.from_numpy(content).view(self.dtype).view(-1, self.width)

    def _save(self, block: int, chunk: int, batches: Iterable[Tensor]) -> None:
        """Write a chunk's file. Another process may write the same bytes at the same time."""
        path = self._path(block, chunk)
        part = path.with_name(f"{path.name}-{uuid4().hex}.part")
        self.folder.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:  # a mapped write to a full disk would kill the process
            contents = (x.to(self.dtype).contiguous() for x in batches)
            use_on_host(contents, lambda x: file.write(x.view(torch.uint8).numpy().data))
            if not BOOT_ID:  # nothing would show a power cut, which loses files that are not on the disk
                file.flush()
                os.fsync(file.fileno())
        part.replace(path)

    def _path(self, block: int, chunk: int) -> Path:
        return self.folder / f"{block:04d}-{chunk:04d}.bin"


class PassProgress:
    """The number of finished blocks of a pass, kept in a file; −1 before the first activations are stored."""

    def __init__(self, folder: Path, stores: Sequence[ActivationStore], most: int) -> None:
        """Read an interrupted run's progress, if it finished at most `most` blocks and its activations are there."""
        self.folder, self.stores = folder, stores
        self.finished = -1
        self.first_not_finite: str | None = None  # the first block with activations that are not finite
        self._saved = time.monotonic()
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # missing or damaged files
            content = json.loads((folder / PROGRESS).read_bytes())
            is_usable = content["boot"] == BOOT_ID and 0 <= content["finished"] <= most
            if is_usable and all(store.is_complete(content["finished"]) for store in stores):
                self.finished, self.first_not_finite = content["finished"], content["not_finite"]

    def count_block(self, *, is_last: bool = False) -> None:
        """Count the next block, whose outputs are stored; write the progress if their files are, or are due."""
        self.finished += 1
        written_later = any(store.written_later for store in self.stores)
        if written_later and not is_last and time.monotonic() - self._saved < SAVED_EVERY:
            return
        for store in self.stores:
            store.flush(self.finished)
        self._saved = time.monotonic()
        content = {"finished": self.finished, "boot": BOOT_ID, "not_finite": self.first_not_finite}
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / "progress.part"
        part.write_text(json.dumps(content), encoding="utf-8")
        part.replace(self.folder / PROGRESS)
        for store in self.stores:
            store.drop(self.finished)
