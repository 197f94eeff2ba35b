"""Runs many rows through all blocks, one block at a time.

The unit of work is one block on one shard of rows: a function that reads the shard's hidden states from a file, writes
the next ones to another, and returns sums. It is called in this process, or runs as a task of a Ray cluster whose nodes
see the same files (`engine.executor`). Neither the model nor the data has to fit in memory, and an interrupted run
resumes at the last finished block.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from wanda_dvc.engine import training
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.executor import Executor, Here
from wanda_dvc.engine.recorder import InputRecorder, Recorded, Sums, finding_not_finite
from wanda_dvc.engine.rows import Row, as_rows, shards
from wanda_dvc.engine.states import HiddenStates, Progress, load_progress, not_finite
from wanda_dvc.engine.structure import Linear
from wanda_dvc.engine.weights import Change
from wanda_dvc.errors import FIX, UserError, notice

T = TypeVar("T")
R = TypeVar("R")
Rows = Sequence[Row] | Int[Tensor, "samples length"]
Opened = Callable[[torch.device], Decoder]  # the model on a device
# Arguments, of one shard: the model, rows, their last hidden states, and an input of the function.
Head = Callable[[Decoder, Sequence[Row], Sequence[Float[Tensor, "_ width"]], T], Iterator[R]]


class Shard(NamedTuple):
    """Some neighbouring rows."""

    number: int
    rows: list[Row]


# --- units of work ---


@dataclass(frozen=True)
class Block:
    """A block to run, and the files of hidden states before and after it."""

    index: int
    then: int  # the block that follows, to read ahead
    own: HiddenStates
    dense: HiddenStates | None = None  # of the dense model, if its rows run too
    change: Change | None = None  # of the block's weights
    records: bool = False  # statistics of the inputs of its linears
    gram: bool = False  # Gram matrices too
    crosses: bool = False  # and products with the dense model's inputs

    def load(self, model: Decoder, row: Row) -> None:
        """Load the block, unless it is loaded."""
        model.calls(row)  # the first call runs the first block, which must not be loaded yet
        model.hold(self.index, self.then, self.change)


class Done(NamedTuple):
    """The result of one block on one shard."""

    sums: Sums | None
    checksums: dict[str, int]  # of the hidden states after the block, by stream
    not_finite: str | None  # the place of the first non-finite hidden states


@torch.no_grad()
def embed(opened: Opened, streams: Mapping[str, HiddenStates], device: torch.device, shard: Shard) -> Done:
    """Write a shard's hidden states before the first block."""
    model = opened(device)
    for row in shard.rows:
        model.calls(row)
    written = {
        name: states.write(0, shard.number, (model.embed(row)[0] for row in shard.rows))
        for name, states in streams.items()
    }
    return Done(None, written, None)


@torch.no_grad()
def run_block(opened: Opened, block: Block, device: torch.device, shard: Shard) -> Done:
    """Run a shard through a block: write its next hidden states, and those of the dense model if its rows run too."""
    model, written = opened(device), dict[str, int]()
    block.load(model, shard.rows[0])
    before, dense = block.own.read(block.index, shard.number), list[Tensor]()
    recorder = InputRecorder(gram=block.gram) if block.records else None
    passes = _Pass(model, block.index, shard.rows)
    if block.dense is not None:
        dense = block.dense.read(block.index, shard.number)
        written["dense"] = block.dense.write(block.index + 1, shard.number, passes.through(dense))
    after = passes.through(before, recorder, dense if block.crosses else ())  # no trial run is recorded
    with recorder.recording(model.linears(block.index)) if recorder else contextlib.nullcontext():
        written["own"] = block.own.write(block.index + 1, shard.number, after)
    if recorder is None:
        return Done(None, written, passes.not_finite)
    if passes.not_finite:
        raise UserError(
            f"{model.checkpoint}: {passes.not_finite}: activations that are not finite, expected finite ones; {FIX}"
        )
    recorder.check_finite(block.index)
    return Done(recorder.only_sums(), written, None)


def train_block(
    opened: Opened, block: Block, rows: Sequence[Row], device: torch.device, settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Train a changed block on its masks (`engine.training`), towards the dense model's hidden states after it."""
    assert block.change is not None
    assert block.dense is not None
    model = opened(device)
    block.load(model, rows[0])
    cut = range(len(block.own.lengths))
    return training.train(
        model,
        block.index,
        block.change.keeps,
        rows=rows,
        inputs=[x for shard in cut for x in block.own.read(block.index, shard)],
        targets=[x for shard in cut for x in block.dense.read(block.index + 1, shard)],
        **settings,
    )


def run_head(
    opened: Opened, states: HiddenStates, function: Head[T, R], device: torch.device, shard: tuple[Shard, T]
) -> Iterator[R]:
    """Apply a function to a shard's hidden states after the last block."""
    model, ((number, rows), given) = opened(device), shard
    return function(model, rows, states.read(len(model.blocks), number), given)


@dataclass
class _Pass:
    """Passes of a shard's rows through a loaded block."""

    model: Decoder
    index: int
    rows: list[Row]
    not_finite: str | None = None  # the place of the first non-finite hidden states

    def through(
        self, before: Sequence[Tensor], recorder: InputRecorder | None = None, dense: Sequence[Tensor] = ()
    ) -> Iterator[Float[Tensor, "length width"]]:
        """Try which rows run together, at once; then yield the rows' hidden states after the block.

        A recorder sees the inputs of its linears; of each row, those of the matching row of `dense` first.
        """
        groups = [[number] for number in range(len(self.rows))] if dense else self._groups(before)
        return self._by_group(before, groups, recorder, dense)

    def _by_group(
        self, before: Sequence[Tensor], groups: list[list[int]], recorder: InputRecorder | None, dense: Sequence[Tensor]
    ) -> Iterator[Float[Tensor, "length width"]]:
        finite = list[Tensor]()
        for group in groups:
            row = self.rows[group[0]]
            if dense and recorder:
                with recorder.dense(len(row.tokens)):
                    self.model.run(self.index, self._together(dense, group), row)
            given = self._together(before, group)
            after = self.model.run(self.index, given, row)
            finite += [torch.stack(x.aminmax()).isfinite().all() for x in after]  # in one pass
            yield from after
            if recorder:
                recorder.see_block(given, after)
                recorder.end_window()
        if self.not_finite is None and finite:
            found = torch.stack(finite).tolist()  # the host waits for a GPU here, once for all rows
            if not all(found):
                number = [number for group in groups for number in group][found.index(False)]
                self.not_finite = self._first_not_finite(self._together(before, [number]), self.rows[number])

    def _groups(self, before: Sequence[Tensor]) -> list[list[int]]:
        """Return neighbours of one length, which run through the block together."""
        groups: list[list[int]] = []
        for number, row in enumerate(self.rows):
            last = groups[-1] if groups else []
            if last and len(last) < self.model.together(row) and self._length(last[0]) == self._length(number):
                last.append(number)
            else:
                groups.append([number])
        several = next((group for group in groups if len(group) > 1), None)
        if several:
            hidden = self._together(before, several[:2])
            if not self.model.takes_several(self.index, hidden, self.rows[several[0]]):
                return [[number] for number in range(len(self.rows))]
        return groups

    def _length(self, number: int) -> int:
        return len(self.rows[number].tokens)

    def _together(self, every: Sequence[Tensor], rows: list[int]) -> Float[Tensor, "rows length width"]:
        """Return the hidden states of rows of one length, on the device."""
        if len(rows) == 1:
            return every[rows[0]][None].to(self.model.device)
        return torch.stack([every[row].to(self.model.device) for row in rows])

    def _first_not_finite(self, before: Float[Tensor, "1 length width"], row: Row) -> str:
        """Run this row through the block once more; return the first module with a non-finite result."""
        if not before.isfinite().all():
            return "embeddings" if self.index == 0 else f"the blocks before block {self.index}"
        with finding_not_finite(self.model.linears(self.index)) as found:
            self.model.run(self.index, before, row)
        return f"block {self.index}, {found[0] if found else 'after its linears'}"


# --- the walk ---


@dataclass
class Runner:
    """Runs the rows of one walk through a model, and other functions between its steps."""

    decoder: Decoder  # in this process: the model's structure, and its weights outside blocks
    work: Path  # for the hidden states
    executor: Executor | None = None  # None: this process
    rows: list[Row] = field(default_factory=list, init=False)
    _own: HiddenStates | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        executor: Executor = self.executor or Here(self.decoder.device)
        self.map, self.opened = executor.map, executor.opener(self.decoder)

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return len(self.decoder.blocks)

    @property
    def not_finite(self) -> str | None:
        """The place of the first non-finite hidden states, or None."""
        return not_finite(self.work)

    @property
    def shards(self) -> list[Shard]:
        """The rows, cut into shards."""
        return [Shard(number, self.rows[cut.start : cut.stop]) for number, cut in enumerate(shards(len(self.rows)))]

    def states(
        self, folder: Path, every: Sequence[Shard], *, dtype: torch.dtype | None = None, kept: int = 2, room: int = 0
    ) -> HiddenStates:
        """Return the files of hidden states of some shards, by default in the dtype of the walk."""
        lengths = [[len(row.tokens) for row in shard.rows] for shard in every]
        width = self.decoder.model.config.get_text_config().hidden_size
        dtype, device = dtype or self.decoder.dtype, self.decoder.device
        return HiddenStates(folder, lengths, width, dtype, kept=kept, device=device, room=room)

    def walk(self, rows: Rows, *, kept: int | None = None, with_dense: bool = False) -> Iterator["Step"]:
        """Yield a step for each block, whose methods run the rows through the block.

        The walk resumes after the last finished block in `work` for these rows. The caller has the results of `kept`
        blocks from an interrupted run; if more blocks are finished, the walk starts again. With `with_dense` each row
        also runs through the dense model, without changes of blocks.
        """
        self.rows = as_rows(rows)
        every, names = self.shards, ["own", "dense"] if with_dense else ["own"]
        room = self.decoder.room() // len(names)
        streams = {name: self.states(self.work / name, every, room=room) for name in names}
        self._own = streams["own"]
        if kept == self.blocks:
            return
        self.decoder.check_tokens(self.rows)
        progress = Progress.open(self.work, streams, self.blocks)
        if kept is not None and progress.finished > kept:
            progress.restart()
        if progress.finished < 0:
            embedding = partial(embed, self.opened, streams)
            progress.finish(by_stream(self.map(embedding, every, "embeddings, shard")))
        report_resumed(progress.finished, self.blocks)
        try:
            for index in range(progress.finished, self.blocks):
                step = Step(self, index, progress)
                yield step
                progress.finish(step.checksums, last=index == self.blocks - 1)
        finally:
            self.decoder.release()
            self.decoder.forget_calls()

    def head(self, function: Head[T, R], inputs: Callable[[range], T | None]) -> Iterator[R]:
        """Apply a function to the last hidden states of the shards that it has an input for, in the shards' order.

        `inputs` returns the input of a shard, by its rows, or None.
        """
        assert self._own is not None
        heading = partial(run_head, self.opened, self._own, function)
        for found in self.map(heading, self._with(inputs), "output head, shard"):
            yield from found

    def _with(self, inputs: Callable[[range], T | None]) -> Iterator[tuple[Shard, T]]:
        for shard, rows in zip(self.shards, shards(len(self.rows)), strict=True):
            given = inputs(rows)
            if given is not None:
                yield shard, given
            del given  # before the next shard's is read


@dataclass
class Step:
    """One block of a walk of all rows. Every row must run through it before the next step; the last run counts."""

    runner: Runner
    index: int
    progress: Progress
    checksums: dict[str, list[int]] = field(default_factory=dict, init=False)

    @property
    def linears(self) -> dict[str, Linear]:
        """The block's prunable weights."""
        return self.runner.decoder.linears(self.index)

    def advance(self) -> None:
        """Run every row through the block."""
        self._run(self._block())

    def record(self, *, gram: bool = False, crosses: bool = False) -> Recorded:
        """Run every row through the block; return the statistics of its linears' inputs.

        `gram` adds Gram matrices, and `crosses` the products with the dense model's inputs.
        """
        return self._run(self._block(records=True, gram=gram, crosses=crosses)).of(self.linears)

    def change(self, keeps: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Run every own row through the block once more, with masked weights and the given new weights."""
        self._run(self._block(dense=None, change=Change(keeps, weights)))

    def train(self, keeps: Mapping[str, Tensor], weights: Mapping[str, Tensor], **settings: Any) -> dict[str, Tensor]:
        """Train the block on the masks (`engine.training`), from the given weights; return its new weights."""
        training = partial(
            train_block, self.runner.opened, self._block(change=Change(keeps, weights)), self.runner.rows
        )
        return next(self.runner.map(training, [settings], f"training of block {self.index}"))

    def _block(self, **changes: Any) -> Block:
        words = {"then": self.index + 1} | dict(self.progress.streams) | changes
        return Block(self.index, **words)

    def _run(self, block: Block) -> Sums:
        """Run every shard through the block. Return the sums of all shards, merged in their order."""
        running, total, done = partial(run_block, self.runner.opened, block), Sums(), list[Done]()
        for one in self.runner.map(running, self.runner.shards, f"block {self.index}, shard"):
            self.progress.not_finite = self.progress.not_finite or one.not_finite
            done.append(one._replace(sums=None))
            if one.sums is not None:
                total.merge(one.sums)
            del one  # before the next shard's sums are there
        self.checksums |= by_stream(done)
        return total


def by_stream(done: Iterable[Done]) -> dict[str, list[int]]:
    """Return the checksums of all shards, by stream."""
    found: dict[str, list[int]] = {}
    for one in done:
        for name, checksum in one.checksums.items():
            found.setdefault(name, []).append(checksum)
    return found


def report_resumed(kept: int, blocks: int, way: str = "") -> None:
    """Report the number of blocks finished by an interrupted run, if any."""
    if kept > 0:
        notice(f"resuming after {kept} of {blocks} blocks{way}")


def walk(decoder: Decoder, rows: Rows, work: Path, **words: Any) -> Iterator[Step]:
    """Yield a step for each block of a walk in this process (`Runner.walk`)."""
    return Runner(decoder, work).walk(rows, **words)


def outputs(decoder: Decoder, rows: Rows, work: Path) -> list[Float[Tensor, "length width"]]:
    """Return the hidden states after the last block of a finished `walk`: views of files in `work`."""
    runner = Runner(decoder, work)
    runner.rows = as_rows(rows)
    if load_progress(work).get("finished") != runner.blocks:
        raise UserError(f"{work}: hidden states are incomplete, expected those after all blocks; run the stage again")
    every = runner.shards
    states = runner.states(work / "own", every)
    return [x for shard in every for x in states.read(runner.blocks, shard.number)]
