"""One of several processes that run shards through blocks, and what it is told and sent."""

import contextlib
import functools
import hashlib
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from wanda_dvc.engine.checkpoint import Address, Checkpoint, Source
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.fisher import BackwardPass
from wanda_dvc.engine.jobs import Job, R, T, solving_device
from wanda_dvc.engine.recorder import GradientRecorder, Gradients, Sums
from wanda_dvc.engine.rows import Row
from wanda_dvc.engine.runner import Change, Head
from wanda_dvc.engine.states import HiddenStates
from wanda_dvc.engine.walk import LocalStep, begin
from wanda_dvc.errors import UserError, explain, fixable
from wanda_dvc.reading import Entry

REST = -1  # the parcel of what is in no block


class Packed(NamedTuple):
    """A tensor's bytes, which travel without a copy."""

    content: np.ndarray[Any, np.dtype[np.uint8]]
    dtype: torch.dtype
    shape: tuple[int, ...]


def pack(tensor: Tensor) -> Packed:
    """Return a tensor's bytes."""
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return Packed(content, tensor.dtype, tuple(tensor.shape))


def unpack(packed: Packed) -> Tensor:
    """Return the tensor, on the same memory, which may be read-only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(packed.content).view(packed.dtype).view(packed.shape)


@dataclass(frozen=True)
class Outline:
    """What is known of a checkpoint before any tensor is there."""

    name: str
    config: Any
    config_name: str
    entries: Mapping[str, Entry]
    parcels: Mapping[str, int]  # the parcel of each tensor


class Sent(Source):
    """A checkpoint that lies on another machine. Its tensors come in parcels: one a block, and one of all others."""

    def __init__(self, outline: Outline, parcel: Callable[[int], Mapping[str, Packed]]) -> None:
        """`parcel` brings one."""
        self.outline = outline
        self._parcel = functools.lru_cache(maxsize=3)(parcel)  # of no block, of the one at work, and of the next

    def __str__(self) -> str:
        return self.outline.name

    @property
    def where(self) -> Mapping[str, int]:
        """The parcel of each tensor."""
        return self.outline.parcels

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Dtype and shape of each tensor."""
        return self.outline.entries

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.outline.config

    @property
    def config_name(self) -> str:
        """Its name in messages."""
        return self.outline.config_name

    def read(self, address: Address) -> Tensor:
        """The tensor, or the expert's part of it. It is read-only."""
        whole = unpack(self._parcel(self.where[address.tensor])[address.tensor])
        return whole if address.expert is None else whole[address.expert]

    def parameter(self, name: str, stored: Address | None) -> Tensor | None:
        """The stored tensor, where there is one."""
        return None if stored is None else self.read(stored)


@dataclass(frozen=True)
class Order:
    """What all workers are told: which folders they may read, if they find them with the driver's fingerprints."""

    folders: Mapping[Path, str]


@dataclass(frozen=True)
class WalkOrder(Order):
    """What the workers of a walk are told. The only folder is the checkpoint's."""

    outline: Outline
    dtype: torch.dtype
    work: Path  # the driver's folder for hidden states


def order(decoder: Decoder, work: Path) -> WalkOrder:
    """Return what the workers of a walk have to know of a model on disk."""
    checkpoint = decoder.checkpoint
    assert isinstance(checkpoint, Checkpoint)
    weights, parcels = decoder.weights, dict.fromkeys(checkpoint.where, REST)
    for index, block in enumerate(decoder.blocks):
        for name, _ in block.named_parameters():
            for part in weights.parts(f"{weights.blocks_name}.{index}.{name}"):
                parcels[part.address.tensor] = index
    outline = Outline(str(checkpoint), checkpoint.config, checkpoint.config_name, checkpoint.entries, parcels)
    folders = fingerprints(checkpoint.folder)
    return WalkOrder(folders, outline, decoder.dtype, work)


def fingerprints(*folders: Path) -> dict[Path, str]:
    """Return for each folder a hash of its provenance and configuration and of its files' sizes.

    It is the same for all folders that are not there.
    """
    return {folder: _fingerprint(folder) for folder in folders}


def _fingerprint(folder: Path) -> str:
    told = hashlib.sha256()
    for path in sorted(folder.glob("*")) if folder.is_dir() else []:
        if path.suffix == ".safetensors":
            told.update(f"{path.name}: {path.stat().st_size}\n".encode())
        elif path.name in ("provenance.json", "config.json"):
            told.update(path.read_bytes())
    return told.hexdigest()


@dataclass
class _Shard:
    rows: list[Row]
    own: range
    states: HiddenStates


class Worker:
    """One of several processes that run shards through blocks.

    A block stays open from one shard to the next, with the weights that it was given for this turn.
    """

    def __init__(self, name: str, *, device: str, at_driver: bool, fetch: Callable[[Any], Any]) -> None:
        """`name` is its place in messages. `fetch` brings what the driver has put somewhere."""
        self.name, self.device, self.at_driver, self._fetch = name, torch.device(device), at_driver, fetch
        self._shards: dict[int, _Shard] = {}
        self._back: dict[int, BackwardPass] = {}
        self._held: list[tuple[Path, FileLock]] = []  # folders of both
        self._refs: dict[int, Any] = {}
        self._failure: Exception | None = None
        self._open = contextlib.ExitStack()
        self._opened: tuple[int, bool] | None = None  # the block, and whether its weights were changed

    def do(self, method: str, parcels: Mapping[int, list[Any]], *words: Any) -> Any:
        """Do one thing; what goes wrong names this worker."""
        try:
            if self._failure:  # of a call that nobody waited for
                raise self._failure
            if parcels:  # those of the place and of the next: what a worker holds of others stays in the store
                self._refs = {number: ref for number, (ref,) in parcels.items()}
            return getattr(self, method)(*words)
        except Exception as error:
            self._failure = error
            if fixable(error):
                raise UserError(*(f"worker on {self.name}: {line}" for line in explain(error))) from None
            raise RuntimeError(f"worker on {self.name}: {type(error).__name__}: {error}") from error

    def take(self, order: Order) -> bool:
        """Take an order. Return whether its folders are here too."""
        self.order, self._has_files = order, fingerprints(*order.folders) == order.folders
        return self._has_files

    def job(self, function: Job[T, R], asked: T) -> R:
        """What a function makes of what is asked."""
        return function(solving_device(self.device), asked)

    @functools.cached_property
    def decoder(self) -> Decoder:
        """The model."""
        asked = self._walk
        (folder,) = asked.folders
        source: Path | Source = folder if self._has_files else Sent(asked.outline, lambda n: self._fetch(self._refs[n]))
        return Decoder(source, dtype=asked.dtype, device=self.device)

    @property
    def _walk(self) -> WalkOrder:
        assert isinstance(self.order, WalkOrder)
        return self.order

    def ready(self, number: int) -> None:
        """Divide the room on a card by the number of shards that come here."""
        self._room = self.decoder.room() // number

    @torch.no_grad()
    def begin(
        self, number: int, rows: list[Row], with_dense: bool, kept: int | None, on_card: bool
    ) -> tuple[int, str | None]:
        """Take a shard, whose hidden states may stay on a card.

        Return the blocks that it has finished here in a killed run, and where it was not finite.
        """
        self._close()
        folder = self._folder(f"shard_{number:05d}")
        rows = rows * (1 + with_dense)
        states = begin(self.decoder, rows, folder, kept=kept, room=self._room if on_card else 0)
        self._shards[number] = _Shard(rows, range(len(rows) // 2 if with_dense else 0, len(rows)), states)
        return states.finished, states.not_finite

    def begin_back(self, number: int, rows: list[Row], kept: int) -> tuple[int, None]:
        """Take a shard for the way back. Return the places that it has finished here in a killed run."""
        self._close()
        self._back[number] = BackwardPass(self.decoder, rows, self._folder(f"back_{number:05d}"), kept=kept)
        return self._back[number].finished, None

    # Each of these returns its result, and where the shard first was not finite.

    def advance(self, number: int, block: int) -> tuple[None, str | None]:
        """All rows of a shard through a block."""
        step = self._step(number, block)
        step.advance()
        return None, step.states.not_finite

    def record(self, number: int, block: int, gram: bool, crosses: bool) -> tuple[Sums, str | None]:
        """All rows of a shard through a block; the sums of what its linears read."""
        step = self._step(number, block)
        if step.dense:
            step.advance(rows=step.dense)
        sums = step.record_shard(range(len(step.own)), gram=gram, crosses=crosses)
        return sums.cpu(), step.states.not_finite

    def change(self, number: int, block: int, change: Change) -> tuple[None, str | None]:
        """The own rows of a shard through a block with other weights."""
        step = self._step(number, block, change)
        step.advance(rows=step.own)
        return None, step.states.not_finite

    def replay(self, number: int, block: int, change: Change | None) -> tuple[None, str | None]:
        """All rows of a shard through a block whose results the driver has."""
        if change is None:
            return self.advance(number, block)
        if (step := self._step(number, block)).dense:
            step.advance(rows=step.dense)
        return self.change(number, block, change)

    def back(self, number: int, place: int, gram: bool) -> tuple[Gradients, None]:
        """All rows of a shard through the block at a place of the way back; what came back to its linears."""
        way = self._back[number]
        self._finish_before(way, place)
        self._enter(way.block, then=way.then)
        recorder = GradientRecorder(gram=gram)
        way.advance(recorder)
        return recorder.cpu(), None

    def head(self, number: int, function: Head[T, R], asked: T) -> list[R]:
        """What a function makes of a shard's last hidden states."""
        shard = self._shards[number]
        self._finish_before(shard.states, len(self.decoder.blocks))
        return list(function(self.decoder, shard.rows, shard.states.before, asked))

    def end(self) -> None:
        """Forget the walk, also on disk."""
        self._close()
        for folder, lock in self._held:
            shutil.rmtree(folder, ignore_errors=True)
            lock.release()
        self._held.clear()
        self._shards.clear()
        self._back.clear()

    def _step(self, number: int, block: int, change: Change | None = None) -> LocalStep:
        """A shard's turn at a block, which stays open with its weights for the next shard."""
        shard = self._shards[number]
        self._finish_before(shard.states, block)
        step = LocalStep(self.decoder, block, shard.rows, shard.states, shard.own, frozenset({shard.own.start}))
        if self._enter(block, changed=change is not None) and change is not None:
            keeps, weights = change
            step.prune(keeps)
            step.replace(weights)
        return step

    def _enter(self, block: int, *, changed: bool = False, then: int | None = None) -> bool:
        """Open a block, unless it is open as it is asked for; return whether it was opened. `then` is the next one."""
        if self._opened == (block, changed):
            return False
        self._close()
        self._open.enter_context(self.decoder.block(block, then))
        self._opened = block, changed
        return True

    def _finish_before(self, states: HiddenStates | BackwardPass, place: int) -> None:
        """End the turn before a block, or before a place of the way back: what the rows were last given counts."""
        if states.finished == place - 1:
            states.finish_block()
        assert states.finished == place

    def _close(self) -> None:
        self._open.close()
        self._opened = None

    def _folder(self, name: str) -> Path:
        """A folder for a shard's hidden states: that of a killed run, but for another process that is still at it."""
        asked = self._walk.work
        root = asked if self.at_driver else Path(tempfile.gettempdir()) / "wanda-dvc" / asked.name
        root.mkdir(parents=True, exist_ok=True)
        folder, lock = root / name, FileLock(root / f"{name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            folder = Path(tempfile.mkdtemp(prefix=f"{name}_", dir=root))
            lock = FileLock(folder / "lock")
            lock.acquire()
        self._held.append((folder, lock))
        return folder
