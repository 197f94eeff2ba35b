"""Tasks: one block on one shard, forward or backward; a shard's output head; a job. Tasks are stateless.

A task takes hidden states and returns the next ones, packed, and the shard's sums. It runs in any process on any node,
and its result is byte-identical each time. A process caches the empty model and its last block.
"""

import contextlib
import hashlib
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from wanda_dvc.engine import fisher
from wanda_dvc.engine.checkpoint import Address, Checkpoint, Source
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.jobs import R, T
from wanda_dvc.engine.recorder import GradientRecorder, Gradients, Sums
from wanda_dvc.engine.rows import Row
from wanda_dvc.engine.runner import Change, Head
from wanda_dvc.engine.states import ShardStates
from wanda_dvc.engine.walk import LocalStep
from wanda_dvc.errors import UserError


class Packed(NamedTuple):
    """A tensor's bytes; processes exchange them without a copy."""

    content: np.ndarray[Any, np.dtype[np.uint8]]
    dtype: torch.dtype
    shape: tuple[int, ...]


def pack(tensor: Tensor) -> Packed:
    """Return a tensor's bytes."""
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return Packed(content, tensor.dtype, tuple(tensor.shape))


def unpack(packed: Packed) -> Tensor:
    """Return the tensor, on the packed memory, which may be read-only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(packed.content).view(packed.dtype).view(packed.shape)


# --- the model ---


@dataclass
class Sent(Source):
    """A checkpoint with files on another node. Tasks bring the weights of most blocks."""

    name: str  # in messages
    config: Any = None
    config_name: str = ""
    entries: Any = None  # dtype and shape of each tensor
    where: Any = None
    tensors: Mapping[str, Packed] = field(default_factory=dict)  # outside blocks, and of blocks run at loading
    block: Mapping[str, Packed] = field(default_factory=dict)  # of the current block

    def __str__(self) -> str:
        return self.name

    def read(self, address: Address) -> Tensor:
        """Return the tensor, or the expert's part of it; read-only."""
        holder = self.block if address.tensor in self.block else self.tensors
        tensor = unpack(holder[address.tensor])
        return tensor if address.expert is None else tensor[address.expert]


@dataclass(frozen=True)
class Model:
    """A checkpoint and its compute dtype. Two are equal if their files and dtypes are equal."""

    folder: Path
    fingerprint: str
    dtype: torch.dtype
    has_files: bool  # whether every node has the files
    sent: Sent | None = field(default=None, compare=False)  # if not


def describe(decoder: Decoder, folder: Path, *, has_files: bool) -> Model:
    """Return a decoder's model for tasks, from its checkpoint's folder."""
    source, found = decoder.checkpoint, None
    if not has_files:
        later = set(range(len(decoder.blocks))).difference(decoder.one_of_each_kind)
        left = {name for index in later for name in names(decoder, index)}
        tensors = read(decoder.device, folder, [name for name in source.where if name not in left])
        found = Sent(str(source), source.config, source.config_name, source.entries, source.where, tensors)
    return Model(folder, fingerprint(folder), decoder.dtype, has_files, found)


def names(decoder: Decoder, index: int) -> list[str]:
    """Return the stored names of a block's tensors."""
    weights, prefix = decoder.weights, f"{decoder.weights.blocks_name}.{index}."
    parts = [part for name, _ in decoder.blocks[index].named_parameters() for part in weights.parts(prefix + name)]
    return list(dict.fromkeys(part.address.tensor for part in parts))


def fingerprint(folder: Path) -> str:
    """Return a hash of a folder's provenance, configuration and sizes of files; one hash for all missing folders."""
    content = hashlib.sha256()
    for path in sorted(folder.glob("*")) if folder.is_dir() else []:
        if path.suffix == ".safetensors":
            content.update(f"{path.name}: {path.stat().st_size}\n".encode())
        elif path.name in ("provenance.json", "config.json"):
            content.update(path.read_bytes())
    return content.hexdigest()


Weights = Mapping[str, Packed] | None  # a block's; None: from the files


@dataclass(frozen=True)
class Block:
    """A block to run."""

    index: int
    change: str = ""  # names its change; empty: as stored


class _Opened:
    """A model in this process. A block stays loaded for the next task: on a GPU its weights cross the link once."""

    def __init__(self, model: Model, device: torch.device) -> None:
        if model.has_files and fingerprint(model.folder) != model.fingerprint:
            raise UserError(f"{model.folder}: other files than on the driver; run the stage again")
        self.sent = model.sent
        self.decoder = Decoder(self.sent or model.folder, dtype=model.dtype, device=device)
        self._block: Block | None = None
        self._stack = contextlib.ExitStack()

    def step(
        self, block: Block, weights: Weights, change: Change | None, rows: list[Row], states: ShardStates
    ) -> LocalStep:
        """Return the step of a shard's rows at a block; load the block if needed."""
        if any(row.layout for row in rows):
            self.decoder.forget_calls()  # each task has its own copies of rows of questions
        for row in rows:
            self.decoder.calls(row)  # the first call runs the first block, which must not be loaded yet
        every = rows * (len(states.before) // len(rows))  # the dense model's come first
        own = range(len(every) - len(rows), len(every))
        step = LocalStep(self.decoder, block.index, every, states, own, frozenset({own.start}))
        if self._block != block:
            self._stack.close()
            self._block = None
            if self.sent:
                self.sent.block = weights or {}
            self._stack.enter_context(self.decoder.block(block.index, then=-1))
            if change:
                step.prune(change[0])
                step.replace(change[1])
            self._block = block
        return step


_opened = lru_cache(maxsize=1)(_Opened)


# --- tasks; the first argument is the device, as in jobs ---


@torch.no_grad()
def embed(device: torch.device, model: Model, rows: list[Row]) -> Packed:
    """Return a shard's hidden states before the first block."""
    return _join(_opened(model, device).decoder.embed(row)[0] for row in rows)


@torch.no_grad()
def forward(  # noqa: PLR0913, PLR0917 - Ray resolves references only in arguments
    device: torch.device,
    model: Model,
    block: Block,
    weights: Weights,
    change: Change | None,
    recording: Mapping[str, bool] | None,
    rows: list[Row],
    own: Packed,
    dense: Packed | None,
) -> tuple[Packed, Packed | None, tuple[Sums | None, str | None]]:
    """Run a shard through a block.

    Return its next hidden states, the dense model's hidden states if given, and the driver's part: the sums requested
    by `recording` (arguments of `LocalStep.record_shard`), and the place of the first non-finite hidden states.
    """
    streams, sums = [own] if dense is None else [dense, own], None
    states = ShardStates([row for stream in streams for row in _split(stream, rows)])
    step = _opened(model, device).step(block, weights, change, rows, states)
    if recording is None:
        step.advance()
    else:
        if step.dense:
            step.advance(rows=step.dense)
        sums = step.record_shard(range(len(rows)), **recording).cpu()
    dense_after = _join(states.after(step.dense)) if step.dense else None
    return _join(states.after(step.own)), dense_after, (sums, states.not_finite)


@torch.no_grad()
def loss_gradients(device: torch.device, model: Model, rows: list[Row], last: Packed) -> Packed:
    """Return the gradients of a shard's losses by its hidden states after the last block."""
    return _join(fisher.loss_gradients(_opened(model, device).decoder, rows, _split(last, rows)))


@torch.no_grad()
def backward(  # noqa: PLR0913, PLR0917 - likewise
    device: torch.device,
    model: Model,
    block: Block,
    weights: Weights,
    gram: bool,
    rows: list[Row],
    before: Packed,
    gradients: Packed,
) -> tuple[Packed, Gradients]:
    """Run a shard back through a block. Return the gradients by the hidden states before it, and the sums."""
    opened, recorder = _opened(model, device), GradientRecorder(gram=gram)
    states = ShardStates(_split(before, rows))
    opened.step(block, weights, None, rows, states)
    coming = zip(states.before, _split(gradients, rows), rows, strict=True)
    return _join(fisher.back(opened.decoder, block.index, coming, recorder)), recorder.cpu()


@torch.no_grad()
def head(  # noqa: PLR0913, PLR0917 - likewise
    device: torch.device, model: Model, function: Head[T, R], rows: list[Row], last: Packed, inputs: T | None
) -> list[R]:
    """Apply a function to a shard's last hidden states; return nothing without inputs for the function."""
    if inputs is None:
        return []
    return list(function(_opened(model, device).decoder, rows, _split(last, rows), inputs))


def read(_: torch.device, folder: Path, tensors: Collection[str]) -> dict[str, Packed]:
    """Return the bytes of some tensors of a checkpoint."""
    source = Checkpoint(folder)
    return {name: pack(source.read(Address(name))) for name in tensors}


def _join(rows: Iterable[Float[Tensor, "_ width"]]) -> Packed:
    return pack(torch.cat([row.cpu() for row in rows]))


def _split(states: Packed, rows: Sequence[Row]) -> list[Float[Tensor, "_ width"]]:
    return list(unpack(states).split([len(row.tokens) for row in rows]))
