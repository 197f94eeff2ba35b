"""Runs many rows through all blocks, one block at a time.

The unit of work is one block on one shard of rows: a function that reads the shard's hidden states from a file, writes
the next ones to another, and returns sums. It is called in this process, or runs as a task of a Ray cluster whose nodes
see the same files (`engine.rows.Executor`). Neither the model nor the data has to fit in memory, and an interrupted run
resumes at the last finished block. For the gradients tier, the rows then run backward through all blocks.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from wanda_dvc.engine.activations import ActivationStore, PassProgress
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.executor import Executor, R, T
from wanda_dvc.engine.fisher import FisherSums
from wanda_dvc.engine.load import WeightChange
from wanda_dvc.engine.record import InputRecorder
from wanda_dvc.engine.sequences import Chunk, Hidden, TokenSequence, shards
from wanda_dvc.engine.sums import BlockRecord, InputSums, check_finite
from wanda_dvc.errors import FIX, UserError, notice

Sequences = Sequence[TokenSequence] | Int[Tensor, "samples length"]
Opened = Callable[[torch.device], Decoder]  # the model on a device
M = TypeVar("M", InputSums, FisherSums)
# Arguments, of one shard: the model, rows, their last hidden states, and an input of the function.
Head = Callable[[Decoder, Sequence[TokenSequence], Hidden, T], Iterator[R]]


# --- units of work ---


def with_model(opened: Opened, function: Callable[[Decoder, T], R], device: torch.device, given: T) -> R:
    """Apply a function of the model to an input."""
    return function(opened(device), given)


@dataclass(frozen=True)
class BlockRun:
    """A block to run, and the files of hidden states before and after it."""

    index: int
    own: ActivationStore
    dense: ActivationStore | None = None  # of the dense model, if its rows run too, for products with their inputs
    change: WeightChange | None = None  # of the block's weights
    records: bool = False  # statistics of the inputs of its linears
    gram: bool = False  # Gram matrices too
    writes: bool = True  # the hidden states after the block


@torch.no_grad()
def embed(streams: Sequence[ActivationStore], model: Decoder, shard: Chunk) -> None:
    """Write a shard's hidden states before the first block."""
    for states in streams:
        states.write(0, shard.number, (model.embed(row)[0] for row in shard.rows))


@torch.no_grad()
def run_block(block: BlockRun, model: Decoder, shard: Chunk) -> InputSums:
    """Run a shard through a block: write its next hidden states, and those of the dense model if its rows run too."""
    index, finite = block.index, list[Tensor]()
    model.load(index, index + 1, block.change)
    before, dense = block.own.read(index, shard.number), list[Tensor]()

    def passing(states: Sequence[Tensor], recorder: InputRecorder | None = None) -> Iterator[Tensor]:
        """Yield the states of each row after the block. A recorder sees the dense row's inputs of linears first."""
        for number, row in enumerate(shard.rows):
            if recorder and dense:
                with recorder.dense(len(row.tokens)):
                    model.run(index, dense[number][None].to(model.device), row)
            given = states[number][None].to(model.device)
            after = model.run(index, given, row)
            finite.append(torch.stack(after.aminmax()).isfinite().all())  # in one pass
            yield after[0]
            if recorder:
                recorder.see_block(given, after)
                recorder.end_window()

    if block.dense is not None:
        dense = block.dense.read(index, shard.number)
        block.dense.write(index + 1, shard.number, passing(dense))
    recorder = InputRecorder(linears=model.linears(index), gram=block.gram) if block.records else None
    with recorder.recording() if recorder else contextlib.nullcontext():
        if block.writes:
            block.own.write(index + 1, shard.number, passing(before, recorder))
        else:
            deque(passing(before, recorder), maxlen=0)
    is_finite = all(torch.stack(finite).tolist())  # the host waits for a GPU here, once for all rows
    if recorder is None:
        return InputSums(is_finite=is_finite)
    if not is_finite:
        raise UserError(f"{model.checkpoint}: block {index}: activations that are not finite; {FIX}")
    squares = {name: x.sum_squares for name, x in recorder.sums.stats.items()}  # their activations may be finite
    check_finite(squares, f"block {index}, input", "sums of squares")
    return recorder.sums


def run_head(states: ActivationStore, function: Head[T, R], model: Decoder, shard: tuple[Chunk, T]) -> Iterator[R]:
    """Apply a function to a shard's hidden states after the last block."""
    (number, rows), given = shard
    return function(model, rows, states.read(len(model.blocks), number), given)


# --- the walk ---


@dataclass
class ModelRunner:
    """Runs the rows of one walk through a model, and other functions between its steps."""

    decoder: Decoder  # in this process: the model's structure, and its weights outside blocks
    work: Path  # for the hidden states
    executor: Executor | None = None  # None: this process
    rows: list[TokenSequence] = field(init=False)
    own: ActivationStore = field(init=False)  # of these rows
    progress: PassProgress = field(init=False)

    def __post_init__(self) -> None:
        executor = self.executor or Executor(self.decoder.device)
        self.on_device, self.opened = executor.map, executor.opener(self.decoder)

    def map(self, function: Callable[[Decoder, T], R], inputs: Iterable[T], what: str) -> Iterator[R]:
        """Yield the result of a function of the model for each input, in order (`Executor.map`)."""
        return self.on_device(partial(with_model, self.opened, function), inputs, what)

    @property
    def shards(self) -> list[Chunk]:
        """The rows, cut into shards."""
        return [Chunk(number, self.rows[cut.start : cut.stop]) for number, cut in enumerate(shards(len(self.rows)))]

    def states(
        self, name: str, *, dtype: torch.dtype | None = None, boundaries: int = 2, share: int
    ) -> ActivationStore:
        """Return the files of the rows' hidden states, by default in the dtype of the walk.

        They are those of the last boundaries, and may take a share, 1 / `share`, of the room on a GPU.
        """
        decoder, lengths = self.decoder, [[len(row.tokens) for row in shard.rows] for shard in self.shards]
        width, budget = decoder.model.config.get_text_config().hidden_size, decoder.memory_budget() // share
        dtype = dtype or decoder.dtype
        return ActivationStore(
            self.work / name, lengths, width, dtype, kept=boundaries, device=decoder.device, memory_budget=budget
        )

    def walk(
        self, rows: Sequences, *, kept: int | None = None, with_dense: bool = False, boundaries: int = 2
    ) -> Iterator["BlockStep"]:
        """Yield a step for each block, whose methods run the rows through the block.

        The walk resumes after the last finished block in `work` for these rows. The caller has the results of `kept`
        blocks from an interrupted run; if more blocks are finished, the walk starts again. With `with_dense` each row
        also runs through the dense model, without changes of blocks. The files of all but one of the last
        `boundaries` stay.
        """
        self.rows, blocks = (
            [row if isinstance(row, TokenSequence) else TokenSequence(row) for row in rows],
            len(self.decoder.blocks),
        )
        share = 1 + (with_dense or boundaries > 2)
        names = ["own", "dense"] if with_dense else ["own"]
        streams = [self.states(name, boundaries=boundaries, share=share) for name in names]
        self.own = streams[0]
        if kept == blocks:
            return
        self.decoder.check_tokens(self.rows)
        self.progress = PassProgress(self.work, streams, blocks if kept is None else kept)
        for index in self.unfinished(self.progress, partial(embed, streams), "embeddings, shard"):
            yield BlockStep(self, BlockRun(index, self.own, streams[1] if with_dense else None))

    def unfinished(self, progress: PassProgress, first: Callable[..., None], what: str, way: str = "") -> Iterator[int]:
        """Yield the boundary before each unfinished block, then finish it; `first` writes a shard's boundary 0."""
        blocks = len(self.decoder.blocks)
        if progress.finished > 0:
            notice(f"resuming after {progress.finished} of {blocks} blocks{way}")
        try:
            if progress.finished < 0:
                deque(self.map(first, self.shards, what), maxlen=0)
                progress.finish()
            for number in range(progress.finished, blocks):
                yield number
                progress.finish(last=number == blocks - 1)
        finally:
            self.decoder.unload()

    def sum(self, function: Callable[[Decoder, Chunk], M], total: M, over: Iterable[Chunk], what: str) -> M:
        """Add the sums of some shards, which a function returns, to `total`, in the shards' order; return it."""
        for sums in self.map(function, over, what):
            total.merge(sums)
            del sums  # before the next shard's are there
        return total

    def head(self, function: Head[T, R], inputs: Callable[[range], T]) -> Iterator[R]:
        """Apply a function to each shard's last hidden states, in order, and to what `inputs` returns for its rows."""
        given = zip(self.shards, map(inputs, shards(len(self.rows))), strict=True)
        for found in self.map(partial(run_head, self.own, function), given, "output head, shard"):
            yield from found


@dataclass
class BlockStep:
    """One block of a walk of all rows. Every row must run through it before the next step; the last run counts."""

    runner: ModelRunner
    block: BlockRun

    @property
    def index(self) -> int:
        """The block's number."""
        return self.block.index

    def advance(self) -> None:
        """Run every row through the block."""
        self._run(self.block)

    def record(self, *, gram: bool = False, changes: bool = False) -> BlockRecord:
        """Run every row through the block; return the statistics of its linears' inputs.

        `gram` adds Gram matrices, and dense rows add products with their inputs. With `changes` the own rows' next
        hidden states are not written: `change` follows.
        """
        block = replace(self.block, records=True, gram=gram, writes=not changes)
        return self._run(block).of(self.runner.decoder.linears(self.index))

    def change(self, keeps: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Run every own row through the block once more, with masked weights and the given new weights."""
        self._run(replace(self.block, dense=None, change=WeightChange(keeps, weights)))

    def _run(self, block: BlockRun) -> InputSums:
        """Run every shard through the block. Return the sums of all shards, merged in their order."""
        run = self.runner
        total = run.sum(partial(run_block, block), InputSums(), run.shards, f"block {self.index}, shard")
        if not total.is_finite:
            run.progress.not_finite = run.progress.not_finite or f"block {self.index}"
        return total
