"""Runs many sequences through all blocks, one block at a time.

The unit of work is `run_block(model, block, chunk)`: it reads a chunk's activations before a block from a file, writes
those after the block to another, and returns sums. A loop calls it, or Ray runs it as tasks (`engine.cluster`).
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from wanda_dvc.engine.activations import ActivationStore, PassProgress
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.load import WeightChange
from wanda_dvc.engine.record import InputRecorder
from wanda_dvc.engine.sequences import Chunk, Hidden, States, TokenSequence, cut_into_chunks
from wanda_dvc.engine.sums import BlockRecord, FisherSums, InputSums, RepairSums, check_finite
from wanda_dvc.errors import FIX_NOT_FINITE, UserError, is_out_of_memory, notice

if TYPE_CHECKING:
    from wanda_dvc.engine.cluster import Cluster

ModelInput = Sequence[TokenSequence] | Int[Tensor, "windows length"]
Job = TypeVar("Job")
Input = TypeVar("Input")
Result = TypeVar("Result")
Total = TypeVar("Total", InputSums, FisherSums, RepairSums)
# Arguments: the model; a chunk's sequences, their activations after the last block, and their input of the function.
OutputFunction = Callable[[Decoder, Sequence[TokenSequence], Hidden, Input], Iterator[Result]]


def in_smaller_batches(work: Callable[[Decoder, Job, Chunk], Result]) -> Callable[[Decoder, Job, Chunk], Result]:
    """Repeat a unit of work in batches of half as many windows, each time that a GPU's memory does not suffice."""

    @wraps(work)
    def repeated(model: Decoder, job: Job, chunk: Chunk) -> Result:
        while True:
            try:
                return work(model, job, chunk)
            except RuntimeError as error:
                if model.largest_batch == 1 or not is_out_of_memory(error):
                    raise
            # Both, so that this ends: where a block does not fit, the next try fails before it counts its batches.
            model.batch_limit = model.largest_batch = model.largest_batch // 2
            notice(f"out of GPU memory: continuing with batches of {model.batch_limit} windows, half of the last")

    return repeated


@dataclass(frozen=True)
class BlockRun:
    """A block to run, and the stores of the activations before and after it."""

    index: int
    store: ActivationStore
    change: WeightChange | None = None  # of the block's weights
    records: bool = False  # statistics of the inputs of its linears
    gram: bool = False  # Gram matrices too


@in_smaller_batches
@torch.no_grad()
def embed(model: Decoder, stores: Sequence[ActivationStore], chunk: Chunk) -> None:
    """Write a chunk's activations before the first block to each store."""
    batches = model.batches(chunk.sequences, streamed=not stores[0].on_device)
    for store in stores:
        store.write(0, chunk.number, (model.embed(*batch) for batch in batches))


@in_smaller_batches
@torch.no_grad()
def run_block(model: Decoder, block: BlockRun, chunk: Chunk) -> InputSums:
    """Run a chunk through a block, write its activations after the block, and return sums with `records`."""
    model.load(block.index, block.index + 1, block.change)
    finite: list[Tensor] = []  # a flag for each batch, on the device: the host waits for a GPU once for all of them
    recorder = InputRecorder(linears=model.linears(block.index), gram=block.gram) if block.records else None
    with recorder.recording() if recorder else contextlib.nullcontext():
        after = run_batches(model, block, chunk, finite, recorder)
        block.store.write(block.index + 1, chunk.number, after)
    is_finite = all(torch.stack(finite).tolist())
    if recorder is None:
        return InputSums(is_finite=is_finite)
    if not is_finite:
        raise UserError(f"{model.checkpoint}: block {block.index}: activations that are not finite; {FIX_NOT_FINITE}")
    # The squares of finite activations may still overflow.
    squares = {name: stats.sum_squares for name, stats in recorder.sums.stats.items()}
    check_finite(squares, f"block {block.index}, input", "sums of squares")
    return recorder.sums


def run_batches(
    model: Decoder, block: BlockRun, chunk: Chunk, finite: list[Tensor], recorder: InputRecorder | None = None
) -> Iterator[States]:
    """Yield each batch's activations after a block; `finite` gets a flag for each."""
    batches = model.batches(chunk.sequences, streamed=not block.store.on_device)
    before = block.store.read_batches(block.index, chunk.number, batches, model.copies)
    for batch, states in zip(batches, before, strict=True):
        after = model.run(block.index, states, batch[0])
        if recorder:
            recorder.end_batch()
        finite.append(torch.stack(after.aminmax()).isfinite().all())  # in one pass over them
        yield after


def run_output_function(
    model: Decoder, job: tuple[ActivationStore, OutputFunction[Input, Result]], chunk_and_input: tuple[Chunk, Input]
) -> Iterator[Result]:
    """Apply a function to a chunk's activations after the last block."""
    store, function = job
    chunk, value = chunk_and_input
    return function(model, chunk.sequences, store.read(len(model.blocks), chunk.number), value)


@dataclass
class ModelRunner:
    """Runs the sequences of one forward pass through a model, and other functions of the model between blocks."""

    decoder: Decoder  # in this process; with a cluster for the model's structure
    work: Path  # folder of the activations
    cluster: "Cluster | None" = None  # None: this process
    # Of the pass that `forward` began last:
    chunks: list[Chunk] = field(init=False)
    stores: list[ActivationStore] = field(init=False)
    progress: PassProgress = field(init=False)

    @property
    def store(self) -> ActivationStore:
        """The activations of the first model, or of the only one."""
        return self.stores[0]

    def map(
        self, function: Callable[[Decoder, Job, Input], Result], job: Job, inputs: Iterable[Input], what: str
    ) -> Iterator[Result]:
        """Return function(model, job, input) of each input, in order; a cluster's messages name inputs by `what`."""
        if self.cluster is not None:
            return self.cluster.map(self.cluster.with_model(self.decoder, function, job), inputs, what)
        return map(partial(function, self.decoder, job), inputs)

    def merge(
        self, run: Callable[[Decoder, Job, Chunk], Total], job: Job, chunks: Iterable[Chunk], total: Total, what: str
    ) -> Total:
        """Add the sums run(model, job, chunk) of all chunks, in order, to `total`, which has none; return it."""
        # Another order would give other bits.
        if self.cluster is not None:
            sums = self.cluster.merge(self.cluster.with_model(self.decoder, run, job), chunks, what)
            if sums is not None:
                total.merge(sums)
            return total
        for chunk in chunks:
            total.merge(run(self.decoder, job, chunk))
        return total

    def forward(
        self, sequences: ModelInput, *, finished: int | None = None, kept: int = 1, models: Sequence[str] = ("own",)
    ) -> Iterator["BlockStep"]:
        """Yield a step for each block, whose methods run all sequences through the block.

        The pass resumes after the last finished block in `work`. `finished` is the number of blocks whose results the
        caller has: if more are finished, the pass starts again; None: the caller needs no results. `kept` is the
        number of blocks, up to the last one that ran, after which activations stay. Each of `models` has a store of
        activations, in `stores`; a step runs the first, and the caller the others.
        """
        blocks = len(self.decoder.blocks)
        if finished == blocks:  # the caller has all results: without activations in `work`, the pass would start again
            return
        sequences = [x if isinstance(x, TokenSequence) else TokenSequence(x) for x in sequences]
        self.chunks = cut_into_chunks(sequences, (self.cluster or self.decoder).device.type)
        self.stores = [self.new_store(model, kept=kept) for model in models]
        self.decoder.check_tokens(sequences)
        self.progress = PassProgress(self.work, self.stores, blocks if finished is None else finished)
        if self.progress.finished < 0:
            for _ in self.map(embed, self.stores, self.chunks, "embeddings, chunk"):
                pass
            self.progress.count_block()
        for index in self.unfinished_blocks(self.progress):
            yield BlockStep(self, BlockRun(index, self.store))

    def new_store(self, name: str, *, kept: int, dtype: torch.dtype | None = None) -> ActivationStore:
        """Return a store of the sequences' activations, by default in the model's dtype.

        A pass has two stores at most: with the dense model's activations, or with gradients. The workers of a cluster
        do not share memory, so they pass activations on in files.
        """
        decoder, folder = self.decoder, self.work / name
        lengths = [[len(sequence.tokens) for sequence in chunk.sequences] for chunk in self.chunks]
        width = decoder.model.config.get_text_config().hidden_size
        budget = 0 if self.cluster is not None else decoder.memory_budget() // 2
        return ActivationStore(folder, lengths, width, dtype or decoder.dtype, kept, decoder.device, budget)

    def unfinished_blocks(self, progress: PassProgress, direction: str = "") -> Iterator[int]:
        """Yield each unfinished block's place in the pass; the block is finished when the caller asks for the next."""
        blocks = len(self.decoder.blocks)
        if progress.finished > 0:
            notice(f"resuming after {progress.finished} of {blocks} blocks{direction}")
        try:
            for place in range(progress.finished, blocks):
                yield place
                progress.count_block(is_last=place == blocks - 1)
        finally:
            self.decoder.unload()

    def map_outputs(
        self, function: OutputFunction[Input, Result], input_of: Callable[[range], Input]
    ) -> Iterator[Result]:
        """Yield what a function yields for each chunk; `input_of` returns its input by the places of the sequences."""
        chunks_and_inputs = ((chunk, input_of(chunk.places)) for chunk in self.chunks)
        for results in self.map(run_output_function, (self.store, function), chunks_and_inputs, "output head, chunk"):
            yield from results


@dataclass
class BlockStep:
    """One block of a forward pass. Before the next step, a method must run all sequences; the last run counts."""

    runner: ModelRunner
    block: BlockRun

    @property
    def index(self) -> int:
        """The block's number."""
        return self.block.index

    def run(self) -> None:
        """Run all sequences through the block."""
        self._run(self.block)

    def record(self, *, gram: bool = False) -> BlockRecord:
        """Run all sequences; return statistics of the linears' inputs; with `gram` their Gram matrices."""
        sums = self._run(replace(self.block, records=True, gram=gram))
        return sums.of(self.runner.decoder.linears(self.index))

    def change(self, masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Run all sequences through the block once more, with masked weights and the given new weights."""
        self._run(replace(self.block, change=WeightChange(masks, weights)))

    def _run(self, block: BlockRun) -> InputSums:
        runner = self.runner
        total = runner.merge(run_block, block, runner.chunks, InputSums(), f"block {self.index}, chunk")
        if not total.is_finite:
            runner.progress.first_not_finite = runner.progress.first_not_finite or f"block {self.index}"
        return total
