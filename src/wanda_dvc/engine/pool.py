"""Jobs and walks on several workers. A crew starts them, calls them, and brings what they return: `engine.workers`.

In a walk each has some shards of the rows and their hidden states, and goes through all blocks. The driver asks for one
block at a time and merges what shards give in the shards' order. What a worker had to do that is gone starts again on
another one.
"""

import contextlib
import itertools
import re
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from wanda_dvc.engine import shards
from wanda_dvc.engine.checkpoint import Address
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.fisher import block_order
from wanda_dvc.engine.jobs import Ask, Job, Jobs, R, T
from wanda_dvc.engine.recorder import Gradients, Recorded, Sums
from wanda_dvc.engine.rows import Row, as_rows
from wanda_dvc.engine.runner import Changes, Head, Rows, Runner, Step, report_resumed
from wanda_dvc.engine.worker import REST, Order, WalkOrder, pack
from wanda_dvc.errors import UserError, notice

AHEAD = 2  # shards or jobs that each worker has to do or to hand over
PATIENCE = 3  # workers that a shard or a job may lose


class Lost(Exception):
    """A worker is gone, and with it the hidden states of its shards."""


@dataclass(eq=False)
class Hired:
    """A worker as the driver knows it."""

    handle: Any
    name: str
    has_files: bool  # all that the order names


class Crew(ABC):
    """Starts workers and carries words to them and results back."""

    @abstractmethod
    def hire(self, most: int, asked: Order) -> list[Hired]:
        """Up to so many workers, at least one, that have taken the order. UserError where none comes."""

    @abstractmethod
    def call(self, worker: Hired, *words: Any) -> Any:
        """Begin `Worker.do`; what `put` returned comes as what it was given. Returns a ticket."""

    @abstractmethod
    def get(self, ticket: Any) -> Any:
        """What a call returned or raised. Lost where its worker is gone."""

    @abstractmethod
    def ended(self, ticket: Any) -> bool:
        """Whether a call has ended, or its worker is gone."""

    @abstractmethod
    def put(self, content: Any) -> Any:
        """Leave something for all workers."""

    @abstractmethod
    def dismiss(self, worker: Hired) -> None:
        """End a worker."""


@dataclass
class _Given:
    """A job, and the worker that has it."""

    function: Job[Any, Any]
    ask: Ask[Any]
    worker: Hired | None = None
    ticket: Any = None
    losses: int = 0


@dataclass(kw_only=True)
class Staff(Jobs):
    """Does jobs on workers."""

    order: Order
    crew: Crew
    _workers: list[Hired] = field(default_factory=list, init=False)

    def each(self, function: Job[T, R], asked: Iterable[Ask[T]]) -> Iterator[R]:
        """What a function makes of each thing asked. Whoever has the least to do is asked next."""
        if not self._workers:
            self._hire(sys.maxsize)
        given: deque[_Given] = deque()
        for ask in asked:
            if len(given) >= AHEAD * len(self._workers):
                yield self._first(given)
            given.append(_Given(function, ask))
            self._give(given[-1], given)
        while given:
            yield self._first(given)

    def _give(self, job: _Given, given: Iterable[_Given]) -> None:
        """Have a worker begin a job."""
        busy = [one.worker for one in given if one.worker and not self.crew.ended(one.ticket)]
        job.worker = min(self._workers, key=busy.count)
        told = self.crew.put(job.ask.named if job.worker.has_files else job.ask.whole)
        job.ticket = self.crew.call(job.worker, "job", {}, job.function, told)

    def _first(self, given: deque[_Given]) -> Any:
        """Take what the first job gave. Jobs of a worker that is gone begin again."""
        job = given[0]
        while True:
            try:
                found = self.crew.get(job.ticket)
            except Lost as error:
                lost = job.worker
                assert lost
                job.losses += 1
                self._replace(lost, job.losses, job.ask.name, str(error))
                again = [one for one in given if one.worker is lost]
                for one in again:
                    one.worker = None
                for one in again:
                    self._give(one, given)
            else:
                given.popleft()
                return found

    def _hire(self, most: int, **work: int) -> None:
        """Take up to so many workers on, and say who and how much there is."""
        self._workers = self.crew.hire(most, self.order)
        counts = {"worker": len(self._workers), "node": len({worker.name for worker in self._workers})} | work
        notice(", ".join(f"{count} {what}{'s' * (count != 1)}" for what, count in counts.items()))

    def _replace(self, lost: Hired, losses: int, work: str, why: str) -> None:
        """Do without a lost worker: with those that are left, or with a new one."""
        if losses >= PATIENCE:
            raise UserError(
                f"worker on {lost.name}: died at {work}, as {PATIENCE - 1} before it ({why}), expected it to "
                "end; see that its memory is what `wanda-dvc cost` says"
            )
        notice(f"worker on {lost.name}: gone; what it had to do starts again on another one")
        if lost in self._workers:
            self._workers.remove(lost)
            self.crew.dismiss(lost)
        if not self._workers:
            self._workers = self.crew.hire(1, self.order)


@dataclass(kw_only=True)
class Pool(Staff, Runner):
    """Runs rows on workers."""

    decoder: Decoder
    order: WalkOrder
    _rows: list[Row] = field(default_factory=list, init=False)
    _cut: list[range] = field(default_factory=list, init=False)
    _homes: list[Hired] = field(default_factory=list, init=False)  # of each shard
    _course: list[int] = field(default_factory=list, init=False)  # the block at each place, there or there and back
    # What a worker is told that takes a shard, anew or not, and of whose shards one passes a place again.
    _taking: Callable[[bool], tuple[Any, ...]] = field(init=False)
    _passing: Callable[[int], tuple[Any, ...]] = field(init=False)
    _next: list[int] = field(default_factory=list, init=False)  # the place that a shard is before; −1: nowhere
    _ran: set[int] = field(default_factory=set, init=False)  # shards that went through the place at work
    _losses: list[int] = field(default_factory=list, init=False)
    _not_finite: dict[int, str] = field(default_factory=dict, init=False)  # by shard
    _put: dict[int, Any] = field(default_factory=dict, init=False)  # parcels

    @property
    def not_finite(self) -> str | None:
        """Where the hidden states first were not finite: in the first block, and there in the first shard."""

        def block(shard: int) -> tuple[int, int]:
            number = re.search(r"block (\d+)", self._not_finite[shard])
            return int(number[1]) if number else -1, shard

        return self._not_finite[min(self._not_finite, key=block)] if self._not_finite else None

    def walk(
        self, rows: Rows, *, kept: int | None = None, with_dense: bool = False, changes: Changes | None = None
    ) -> Iterator[Step]:
        """All rows through all blocks. Shards that lost their hidden states go through the kept blocks again."""
        if kept == len(self.decoder.blocks):
            return
        rows = as_rows(rows)
        self._taking = lambda again: ("begin", with_dense, -1 if again else kept, not again)
        self._passing = lambda block: ("replay", changes(block) if changes else None)
        self._begin(rows, shards.cut(len(rows)), list(range(len(self.decoder.blocks))))
        first = kept if kept is not None else min(self._next, default=0)
        report_resumed(first, len(self.decoder.blocks))
        for index in self._places(first):
            yield PoolStep(self, index)

    def backward(self, rows: Rows, *, gram: bool = False, kept: int = 0) -> Iterator[tuple[int, Gradients]]:
        """All rows through all blocks and back. Each is a shard, so sums are those of one row after another."""
        rows, blocks = as_rows(rows), len(self.decoder.blocks)
        for worker in self._workers:
            self._say(worker, 0, "end")
        self._taking = lambda again: ("begin_back", -1 if again else kept)
        self._passing = lambda _: ("back", False)
        self._begin(rows, [range(row, row + 1) for row in range(len(rows))], block_order(blocks))
        first = blocks + kept if kept else min(self._next, default=0)
        report_resumed(first - blocks, blocks, " of the backward pass")
        for place in self._places(first):
            total, index = Gradients(), self._course[place]
            for found in self.run("back", place, gram):
                total.merge(found)
            if place >= blocks:
                total.check_finite(self.decoder.checkpoint, index)
                yield index, total

    def head(self, function: Head[T, R], asked: Mapping[int, T]) -> Iterator[R]:
        """What a function makes of some shards' last hidden states."""
        blocks = len(self.decoder.blocks)
        for _, found in self._each("head", blocks, list(asked), lambda number: (function, asked[number])):
            yield from found

    def run(self, method: str, place: int, *words: Any) -> Iterator[Any]:
        """What a method of all shards' workers returns at a place, in the shards' order."""
        behind = [number for number in range(len(self._cut)) if self._next[number] <= place]
        for number, (found, where) in self._each(method, place, behind, lambda _: words):
            self._note(number, where)
            yield found

    def _places(self, first: int) -> Iterator[int]:
        """The places from one on; whoever has gone through a place is before the next."""
        for place in range(first, len(self._course)):
            self._ran.clear()
            yield place
            for number in self._ran:
                self._next[number] = place + 1

    def _note(self, number: int, where: str | None) -> None:
        """Keep where a shard first was not finite."""
        if where:
            self._not_finite.setdefault(number, where)

    def _begin(self, rows: list[Row], cut: list[range], course: list[int]) -> None:
        """Have every shard taken. One that an earlier run has left on its worker's machine goes on from there."""
        self._rows, self._cut, self._course = rows, cut, course
        self.decoder.check_tokens(rows)
        if not self._workers:
            self._hire(len(cut), shard=len(cut))
        homes = itertools.cycle(self._workers)
        self._homes = [next(homes) for _ in cut]
        self._next, self._losses = [-1] * len(cut), [0] * len(cut)
        self._ran, self._not_finite = set(), {}
        for worker in self._workers:
            count = max(1, self._homes.count(worker))  # there may be fewer shards than on the way before
            self._say(worker, 0, "ready", count)
        tickets = [self._take(number) for number in range(len(cut))]
        for number, ticket in enumerate(tickets):
            with contextlib.suppress(Lost):  # it is found again where it is asked for more
                finished, where = self.crew.get(ticket)
                self._next[number] = finished
                self._note(number, where)

    def _take(self, number: int, *, again: bool = False) -> Any:
        shard, (method, *words) = self._cut[number], self._taking(again)
        self._next[number] = 0
        return self._call(number, 0, method, number, self._rows[shard.start : shard.stop], *words)

    def _each(
        self, method: str, place: int, numbers: Sequence[int], words: Callable[[int], tuple[Any, ...]]
    ) -> Iterator[tuple[int, Any]]:
        """What a method returns for some shards, in their order; `words` are its further arguments."""
        tickets: dict[int, Any] = {}
        waiting = iter(numbers)

        def submit(number: int) -> None:
            tickets[number] = self._submit(method, number, place, words(number))

        for number in numbers:
            for another in itertools.islice(waiting, max(0, AHEAD * len(self._workers) - len(tickets))):
                submit(another)
            while True:
                try:
                    found = self.crew.get(tickets[number])
                    break
                except Lost as error:
                    self._losses[number] += 1
                    self._replace(self._homes[number], self._losses[number], f"shard {number}", str(error))
                    for another in list(tickets):
                        if self._next[another] < 0:
                            submit(another)
            del tickets[number]
            self._ran.add(number)
            yield number, found

    def _submit(self, method: str, number: int, place: int, words: tuple[Any, ...]) -> Any:
        """Begin a method for a shard, after the places that it has lost or not seen."""
        if self._next[number] < 0:
            self._take(number, again=True)
        for behind in range(self._next[number], place):
            passing, *told = self._passing(behind)
            self._call(number, behind, passing, number, behind, *told)
        self._next[number] = place
        if method == "head":
            return self._call(number, place, method, number, *words)
        if method == "change" and number not in self._ran:
            method = "replay"  # the dense model's rows have not been through this block
        return self._call(number, place, method, number, place, *words)

    def _call(self, number: int, place: int, method: str, *words: Any) -> Any:
        return self._say(self._homes[number], place, method, *words)

    def _say(self, worker: Hired, place: int, method: str, *words: Any) -> Any:
        parcels = {} if worker.has_files else {n: [self._parcel(n)] for n in (REST, *self._course[place : place + 2])}
        return self.crew.call(worker, method, parcels, *words)

    def _parcel(self, number: int) -> Any:
        """Where one parcel is left for those workers that do not have the checkpoint."""
        if number not in self._put:
            checkpoint, parcels = self.decoder.checkpoint, self.order.outline.parcels
            names = [name for name, one in parcels.items() if one == number]
            for old in [one for one in self._put if one not in (REST, number - 1, number + 1)]:
                del self._put[old]
            self._put[number] = self.crew.put({name: pack(checkpoint.read(Address(name))) for name in names})
        return self._put[number]

    def _replace(self, lost: Hired, losses: int, work: str, why: str) -> None:
        """Do without a lost worker, whose shards others get."""
        before = list(self._workers)
        super()._replace(lost, losses, work, why)
        for worker in self._workers:
            if worker not in before:
                self._say(worker, 0, "ready", len(self._cut))
        homes = itertools.cycle(self._workers)
        for shard, home in enumerate(self._homes):
            if home is lost:
                self._homes[shard], self._next[shard] = next(homes), -1
                self._ran.discard(shard)


@dataclass
class PoolStep(Step):
    """One block's turn on all workers."""

    pool: Pool
    index: int

    def advance(self) -> None:
        """Every row through the block."""
        for _ in self.pool.run("advance", self.index):
            pass

    def record(self, *, gram: bool = False, crosses: bool = False) -> Recorded:
        """Every row through the block; what its linears read."""
        total = Sums()
        for sums in self.pool.run("record", self.index, gram, crosses):
            total.merge(sums)
        return total.of(self.pool.decoder.linears(self.index))

    def change(self, keeps: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Every own row through the block once more."""
        change = self.pool.crew.put((keeps, weights))
        for _ in self.pool.run("change", self.index, change):
            pass

    def train(self, keeps: Mapping[str, Tensor], weights: Mapping[str, Tensor], **settings: Any) -> dict[str, Tensor]:
        """Not on workers: a training takes one row a step."""
        raise NotImplementedError
