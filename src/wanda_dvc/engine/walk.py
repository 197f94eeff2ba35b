"""Runs many rows through all blocks, one block at a time.

Between two blocks, files hold the hidden states of all rows. So neither the model nor the data has to fit in memory,
and an interrupted run resumes at the last finished block.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from wanda_dvc.engine import shards, training
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.fisher import backward
from wanda_dvc.engine.jobs import Job, JobInput, LocalJobs, R, T, solving_device
from wanda_dvc.engine.recorder import CrossRecorder, Gradients, InputRecorder, Recorded, Sums, finding_not_finite
from wanda_dvc.engine.rows import Row, as_rows
from wanda_dvc.engine.runner import Changes, Head, Rows, Runner, Step, report_resumed
from wanda_dvc.engine.states import HiddenStates, ShardStates, not_finite
from wanda_dvc.engine.structure import Linear
from wanda_dvc.engine.weights import set_parameter
from wanda_dvc.errors import FIX, UserError


@torch.no_grad()
def walk(
    decoder: Decoder, rows: Rows, work: Path, *, kept: int | None = None, with_dense: bool = False
) -> Iterator["LocalStep"]:
    """Yield a step for each block; its `advance` runs the rows through the block.

    The walk resumes after the last finished block in `work` for these rows. The caller has the results of `kept` blocks
    from an interrupted run; if more blocks are finished, the walk starts again. With `with_dense` each row runs twice:
    `LocalStep.dense` are the rows of the dense model, without changes of blocks, and `LocalStep.own` the others.
    """
    if kept == len(decoder.blocks):
        return
    rows = as_rows(rows) * (1 + with_dense)
    own = range(len(rows) // 2 if with_dense else 0, len(rows))
    starts = frozenset(first + shard.start for first in (0, own.start) for shard in shards.cut(len(own)))
    decoder.check_tokens(rows)
    states = _states(decoder, rows, work, decoder.room())
    if kept is not None and states.finished > kept:
        states.finished, states.not_finite = -1, None
    for row in rows:
        decoder.calls(row)
    if states.finished < 0:
        states.write(decoder.embed(row)[0] for row in rows)
        states.finish_block()
    report_resumed(states.finished, len(decoder.blocks))
    try:
        for index in range(states.finished, len(decoder.blocks)):
            with decoder.block(index):
                yield LocalStep(decoder, index, rows, states, own, starts)
            states.finish_block()
    finally:
        decoder.forget_calls()


def outputs(decoder: Decoder, rows: Rows, work: Path) -> list[Float[Tensor, "length width"]]:
    """Return the hidden states after the last block of a finished `walk`: views of a file in `work`."""
    states = _states(decoder, as_rows(rows), work)
    if states.finished != len(decoder.blocks):
        raise UserError(f"{work}: hidden states are incomplete, expected those after all blocks; run the stage again")
    return states.before


def _states(decoder: Decoder, rows: list[Row], work: Path, room: int = 0) -> HiddenStates:
    width = decoder.model.config.get_text_config().hidden_size
    lengths, blocks = [len(row.tokens) for row in rows], len(decoder.blocks)
    return HiddenStates.open(work, lengths, width, decoder.dtype, blocks, device=decoder.device, room=room)


@dataclass
class LocalRunner(Runner):
    """Runs rows in this process."""

    decoder: Decoder
    work: Path  # for the hidden states
    _rows: list[Row] = field(default_factory=list, init=False)
    _states: HiddenStates | None = field(default=None, init=False)  # of the walk, if it ran in this process

    @property
    def not_finite(self) -> str | None:
        """The place of the first non-finite hidden states."""
        return not_finite(self.work)

    def walk(
        self, rows: Rows, *, kept: int | None = None, with_dense: bool = False, changes: Changes | None = None
    ) -> Iterator["LocalStep"]:
        """Run all rows through all blocks. Without hidden states it starts again, and needs no changes."""
        self._rows, self._states = as_rows(rows), None
        for step in walk(self.decoder, self._rows, self.work, kept=kept, with_dense=with_dense):
            assert isinstance(step.states, HiddenStates)
            self._states = step.states
            yield step

    def backward(self, rows: Rows, *, gram: bool = False, kept: int = 0) -> Iterator[tuple[int, Gradients]]:
        """Run all rows forward and backward through all blocks."""
        return backward(self.decoder, as_rows(rows), self.work / "back", gram=gram, kept=kept)

    def head(self, function: Head[T, R], inputs: Callable[[range], T | None]) -> Iterator[R]:
        """Apply a function to some shards' last hidden states."""
        states = self._states  # if they fit on the GPU, they do not cross the link again
        done = states is not None and states.finished == len(self.decoder.blocks)
        hidden = states.before if states and done else outputs(self.decoder, self._rows, self.work)
        for shard in shards.cut(len(self._rows)):
            if (given := inputs(shard)) is not None:
                place = slice(shard.start, shard.stop)
                yield from function(self.decoder, self._rows[place], hidden[place], given)
            del given  # before the next shard's is read

    def each(self, function: Job[T, R], inputs: Iterable[JobInput[T]]) -> Iterator[R]:
        """Apply a function to each input."""
        return LocalJobs(solving_device(self.decoder.device)).each(function, inputs)


@dataclass
class LocalStep(Step):
    """One block of a walk. Changes of its weights last until the next step; the checkpoint does not change."""

    decoder: Decoder
    index: int
    rows: list[Row]
    states: HiddenStates | ShardStates
    own: range  # all rows, or those after the dense model's
    starts: frozenset[int]  # the first row of each shard
    _own: set[tuple[nn.Module, str]] = field(default_factory=set, init=False, repr=False)

    @property
    def linears(self) -> dict[str, Linear]:
        """The block's prunable weights."""
        return self.decoder.linears(self.index)

    @property
    def dense(self) -> range:
        """The rows of the dense model, if the walk includes them."""
        return range(self.own.start)

    def record(self, *, gram: bool = False, crosses: bool = False) -> Recorded:
        """Run every row through this block, shard by shard; return the statistics of its linears' inputs."""
        if self.dense:
            self.advance(rows=self.dense)
        total = Sums()
        for shard in shards.cut(len(self.own)):
            total.merge(self.record_shard(shard, gram=gram, crosses=crosses))
        return total.of(self.linears)

    def record_shard(self, shard: range, *, gram: bool, crosses: bool) -> Sums:
        """Run some of the own rows through this block; return the sums of its linears' inputs."""
        recorder = CrossRecorder(gram=gram) if crosses else InputRecorder(gram=gram)
        rows = range(self.own.start + shard.start, self.own.start + shard.stop)
        self.advance(recorder, rows=rows, dense=shard if crosses else None)
        return recorder

    def change(self, keeps: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Run every own row through this block once more, with `weights`; mask the weights of other linears."""
        self.prune({name: keeps[name] for name in keeps if name not in weights})
        self.replace(weights)
        self.advance(rows=self.own)

    def train(self, keeps: Mapping[str, Tensor], weights: Mapping[str, Tensor], **settings: Any) -> dict[str, Tensor]:
        """Train the block on the masks, from other weights, which the block gets; return the trained weights."""
        self.prune({name: keeps[name] for name in keeps if name not in weights})
        self.replace(weights)
        start = self.own.start
        return training.train(
            self.decoder,
            self.index,
            keeps,
            rows=self.rows[start:],
            inputs=self.states.before[start:],
            targets=self.states.after(self.dense),
            **settings,
        )

    @torch.no_grad()
    def replace(self, weights: Mapping[str, Tensor]) -> None:
        """Give this block other weights, oriented as stored, until the next step."""
        own = self.decoder.weights.of_block(self.index)
        for name, weight in weights.items():
            if weight.shape != own[name].weight.shape:
                found, expected = list(weight.shape), list(own[name].weight.shape)
                raise UserError(f"{name}: its new weight is {found}, expected {expected}, as it is stored")
            self._writable(own[name]).copy_(weight)

    @torch.no_grad()
    def prune(self, keeps: Mapping[str, Tensor]) -> None:
        """Zero this block's weights outside the masks, until the next step."""
        linears = self.linears
        for name, keep in keeps.items():
            self._writable(linears[name]).mul_(keep.to(self.decoder.device))

    def _writable(self, linear: Linear) -> Tensor:
        """Return a linear's weight in a copy of its parameter: the original is a view, or needed by later walks."""
        if (linear.module, linear.leaf) not in self._own:
            self._own.add((linear.module, linear.leaf))
            set_parameter(linear.module, linear.leaf, linear.module.get_parameter(linear.leaf).clone())
        return linear.weight

    @torch.no_grad()
    def advance(
        self, recorder: InputRecorder | None = None, *, rows: range | None = None, dense: range | None = None
    ) -> None:
        """Run every row through this block, or some; a recorder sees the inputs of the block's linears.

        Every row must advance, in order, before the next step; the last run counts. A
        `CrossRecorder` sees the matching row of `dense` as the dense model's.
        """
        rows = range(len(self.rows)) if rows is None else rows
        groups = [range(row, row + 1) for row in rows] if dense else self._groups(rows)
        uncalled = self.decoder.uncalled(self.index) if recorder else ()
        with recorder.recording(self.linears, uncalled) if recorder else contextlib.nullcontext():
            self.states.write(self._outputs(recorder, groups, dense), first=rows.start)
        if recorder:
            recorder.check_finite(self.index)

    def _groups(self, rows: range) -> list[range]:
        """Yield neighbours of one length, to run through the block together."""
        groups: list[range] = []
        for number in rows:
            row, last = self.rows[number], groups[-1] if groups else None
            most = self.decoder.together(row)
            fits = last and len(last) < most and len(self.rows[last.start].tokens) == len(row.tokens)
            if last and fits and number not in self.starts:  # on a GPU, results depend on the composition of a batch
                groups[-1] = range(last.start, number + 1)
            else:
                groups.append(range(number, number + 1))
        several = next((group for group in groups if len(group) > 1), None)
        if several:
            hidden = self._together(self.states.before, several[:2])
            if not self.decoder.takes_several(self.index, hidden, self.rows[several.start]):
                return [range(number, number + 1) for number in rows]
        return groups

    def _together(self, every: Sequence[Tensor], rows: range) -> Float[Tensor, "rows length width"]:
        """Return the hidden states of rows of one length, on the device."""
        if len(rows) == 1:
            return every[rows.start][None].to(self.decoder.device)
        return torch.stack([every[row].to(self.decoder.device) for row in rows])

    def _outputs(
        self, recorder: InputRecorder | None, groups: list[range], dense: range | None
    ) -> Iterator[Float[Tensor, "length width"]]:
        every, finite = self.states.before, list[Tensor]()
        for place, group in enumerate(groups):
            if dense is not None and isinstance(recorder, CrossRecorder):
                number = dense[place]
                with recorder.dense(len(self.rows[number].tokens)):
                    self.decoder.run(self.index, self._together(every, range(number, number + 1)), self.rows[number])
            before, row = self._together(every, group), self.rows[group.start]
            after = self.decoder.run(self.index, before, row)
            finite += [torch.stack(x.aminmax()).isfinite().all() for x in after]  # in one pass
            yield from after
            if recorder:
                recorder.see_block(before, after)
                recorder.end_window()
        self._check_finite([number for group in groups for number in group], finite)
        if recorder and self.states.not_finite:
            raise UserError(
                f"{self.decoder.checkpoint}: {self.states.not_finite}: activations that are not finite, "
                f"expected finite ones; {FIX}"
            )

    def _check_finite(self, rows: list[int], finite: list[Tensor]) -> None:
        """Keep the place of the first non-finite value. The host waits for a GPU here, once for all rows."""
        if self.states.not_finite is None and rows:
            found = torch.stack(finite).tolist()
            if not all(found):
                number = rows[found.index(False)]
                before = self._together(self.states.before, range(number, number + 1))
                self.states.not_finite = self._first_not_finite(before[0], self.rows[number])

    def _first_not_finite(self, before: Float[Tensor, "length width"], row: Row) -> str:
        """Run this row through the block once more; return the first module with a non-finite result."""
        if not before.isfinite().all():
            return "embeddings" if self.index == 0 else f"the blocks before block {self.index}"
        with finding_not_finite(self.linears) as found:
            self.decoder.run(self.index, before[None], row)
        return f"block {self.index}, {found[0] if found else 'after its linears'}"
