"""A walk on workers gives the bytes of a walk in one process, whoever ends first and whoever dies."""

import gc
import pickle
import random
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.losses import window_losses
from wanda_dvc.engine.pool import Crew, Hired, Lost, Pool
from wanda_dvc.engine.recorder import Gradients, Recorded
from wanda_dvc.engine.runner import Change, Runner
from wanda_dvc.engine.walk import LocalRunner
from wanda_dvc.engine.worker import Order, Worker, order
from wanda_dvc.errors import UserError

CPU = torch.device("cpu")


SLOW = (pytest.mark.slow,)  # left out of the everyday part: each worker opens the model
FULL = (pytest.mark.full,)


@dataclass
class Put:
    content: Any


@dataclass(eq=False)
class Ticket:
    worker: Hired
    words: tuple[Any, ...]
    found: Any = None
    done: bool = False


@dataclass
class Shuffled(Crew):
    """Workers in this process. Each does its calls in order; who is next is drawn; what is said is pickled."""

    workers: int
    seed: int = 0
    kill: Callable[[tuple[Any, ...]], bool] = lambda _: False  # at which call its worker dies
    queues: dict[Hired, deque[Ticket]] = field(default_factory=dict)
    said: list[tuple[Any, ...]] = field(default_factory=list)

    def hire(self, most: int, asked: Order) -> list[Hired]:
        hired = []
        for number in range(min(self.workers, most)):
            worker = Worker(f"node {number}", device="cpu", at_driver=True, fetch=lambda ref: ref.content)
            hired.append(Hired(worker, worker.name, worker.do("take", {}, pickle.loads(pickle.dumps(asked)))))
        self.queues |= {one: deque() for one in hired}
        return hired

    def call(self, worker: Hired, *words: Any) -> Ticket:
        ticket = Ticket(worker, pickle.loads(pickle.dumps([x.content if isinstance(x, Put) else x for x in words])))
        if worker in self.queues:
            self.queues[worker].append(ticket)
        return ticket

    def get(self, ticket: Ticket) -> Any:
        generator = random.Random(self.seed + len(self.said))
        while not ticket.done:
            if ticket.worker not in self.queues:
                raise Lost("killed")
            worker = generator.choice([worker for worker, queue in self.queues.items() if queue])
            one = self.queues[worker].popleft()
            self.said.append(one.words)
            if self.kill(one.words):
                self.dismiss(worker)
                continue
            one.found, one.done = pickle.loads(pickle.dumps(worker.handle.do(*one.words))), True
        return ticket.found

    def ended(self, ticket: Ticket) -> bool:
        return ticket.done or ticket.worker not in self.queues

    def put(self, content: Any) -> Put:
        return Put(pickle.loads(pickle.dumps(content)))

    def dismiss(self, worker: Hired) -> None:
        if self.queues.pop(worker, None) is not None:
            worker.handle.end()


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return torch.randint(0, 256, (37, 12), generator=torch.Generator().manual_seed(0))


def decoder(tiny: Path) -> Decoder:
    return Decoder(tiny, dtype=torch.float32, device=CPU)


def pool(tiny: Path, work: Path, crew: Crew) -> Pool:
    opened = decoder(tiny)
    return Pool(decoder=opened, order=order(opened, work), crew=crew)


def change(run: Runner, block: int) -> Change:
    """A mask of every linear, and another norm."""
    keeps, weights = {}, {}
    with run.decoder.block(block):
        for name, linear in run.decoder.linears(block).items():
            keeps[name] = (linear.weight.abs() > linear.weight.abs().median()).clone()
        name = f"model.layers.{block}.input_layernorm"
        weights[name] = run.decoder.weights.of_block(block)[name].weight * 1.5
    return keeps, weights


def through(run: Runner, rows: torch.Tensor, *, with_dense: bool) -> Iterator[bytes]:
    """All bytes that stages write: of blocks that are measured and changed, and of the losses at the end."""
    made = {block: change(run, block) for block in range(len(run.decoder.blocks))}
    for turn in run.walk(rows, with_dense=with_dense, changes=made.__getitem__, kept=0):
        yield dump(turn.record(gram=True, crosses=with_dense))
        turn.change(*made[turn.index])
    if not with_dense:
        yield str(list(run.head(window_losses, {0: 1, 3: 0, 18: 0}))).encode()
        yield from map(dump_back, run.backward(rows[:7], gram=True))


def dump(found: Recorded) -> bytes:
    tensors = [x.upper.triu() for x in found.grams.values()] + list(found.crosses.values())
    tensors += [y for x in found.stats.inputs.values() for y in (x.sum_squares, x.sum)]
    return str(found.stats.readers).encode() + b"".join(x.numpy().tobytes() for x in tensors)


def dump_back(came: tuple[int, Gradients]) -> bytes:
    block, found = came
    tensors = [*found.sums.values(), *(x.upper.triu() for x in found.grams.values())]
    return f"{block} {[*found.sums]} {[*found.grams]}".encode() + b"".join(x.numpy().tobytes() for x in tensors)


@pytest.fixture(scope="module")
def expected(tiny: Path, rows: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, list[bytes]]:
    return {
        with_dense: list(
            through(LocalRunner(decoder(tiny), tmp_path_factory.mktemp("here")), rows, with_dense=with_dense)
        )
        for with_dense in (False, True)
    }


@pytest.mark.parametrize(
    ("workers", "with_dense"),
    [
        pytest.param(1, False, marks=FULL),
        pytest.param(1, True, marks=SLOW),
        (2, False),
        (2, True),
        pytest.param(5, False, marks=SLOW),
        pytest.param(5, True, marks=FULL),
        pytest.param(50, False, marks=FULL),  # more than there are shards
        pytest.param(50, True, marks=SLOW),
    ],
)
def test_workers_give_the_bytes_of_one_process(
    tiny: Path, tmp_path: Path, rows: torch.Tensor, expected: dict[bool, list[bytes]], workers: int, with_dense: bool
):
    run = pool(tiny, tmp_path, Shuffled(workers, seed=workers))
    assert list(through(run, rows, with_dense=with_dense)) == expected[with_dense]


# By method, and whether each row comes twice: at which call its worker dies. In the second half of the second place, or
# of that on the way back, it is far from where its shards start again.
DEATHS = [
    pytest.param("begin", False, 10, marks=SLOW),
    pytest.param("begin", True, 10, marks=FULL),
    ("record", False, 30),
    ("record", True, 30),
    pytest.param("change", False, 25, marks=FULL),
    pytest.param("change", True, 25, marks=SLOW),
    pytest.param("head", False, 1, marks=SLOW),
    pytest.param("begin_back", False, 4, marks=SLOW),
    ("back", False, 40),
]


@pytest.mark.parametrize(("method", "with_dense", "at"), DEATHS)
def test_a_worker_that_dies_costs_its_shards_and_no_byte(
    tiny: Path,
    tmp_path: Path,
    rows: torch.Tensor,
    expected: dict[bool, list[bytes]],
    method: str,
    with_dense: bool,
    at: int,
):
    calls = iter(range(10_000))
    crew = Shuffled(3, kill=lambda words: words[0] == method and next(calls) == at)
    assert list(through(pool(tiny, tmp_path, crew), rows, with_dense=with_dense)) == expected[with_dense]
    assert len(crew.queues) == 2


def test_a_killed_way_back_goes_on(tiny: Path, tmp_path: Path, rows: torch.Tensor, expected: dict[bool, list[bytes]]):
    killed = pool(tiny, tmp_path, Shuffled(2))
    came = killed.backward(rows[:7], gram=True)
    found = [dump_back(next(came)) for _ in range(2)]
    del came, killed
    gc.collect()  # locks end with a process
    crew = Shuffled(2)
    found += map(dump_back, pool(tiny, tmp_path, crew).backward(rows[:7], gram=True, kept=2))
    assert found == expected[False][-4:]
    places = [words[3] for words in crew.said if words[0] == "back"]
    assert sorted(places) == sorted([5, 6, 7] * 7)  # what was given and not finished comes back again


def test_the_last_worker_that_dies_is_replaced(
    tiny: Path, tmp_path: Path, rows: torch.Tensor, expected: dict[bool, list[bytes]]
):
    calls = iter(range(10_000))
    crew = Shuffled(1, kill=lambda words: words[0] == "record" and next(calls) == 25)
    assert list(through(pool(tiny, tmp_path, crew), rows, with_dense=False)) == expected[False]


def test_a_shard_that_kills_every_worker_ends_the_stage(tiny: Path, tmp_path: Path, rows: torch.Tensor):
    crew = Shuffled(2, kill=lambda words: words[0] == "record" and words[2] == 7)
    with pytest.raises(UserError, match=r"^worker on node \d: died at shard 7, as 2 before it \(killed\), expected it"):
        list(through(pool(tiny, tmp_path, crew), rows, with_dense=False))


@pytest.mark.parametrize("workers", [pytest.param(1, marks=FULL), 3])
def test_a_checkpoint_that_a_worker_does_not_have_comes_in_parcels(
    tiny: Path, tmp_path: Path, rows: torch.Tensor, expected: dict[bool, list[bytes]], workers: int
):
    folder = shutil.copytree(tiny, tmp_path / "model")

    class Elsewhere(Shuffled):
        def hire(self, most: int, asked: Order) -> list[Hired]:
            (folder / "config.json").rename(tmp_path / "config.json")
            hired = super().hire(most, asked)
            (tmp_path / "config.json").rename(folder / "config.json")
            assert not any(one.has_files for one in hired)
            return hired

    crew = Elsewhere(workers)
    assert list(through(pool(folder, tmp_path / "work", crew), rows, with_dense=False)) == expected[False]
    # What a worker holds stays in the cluster's store: what is in no block, and two blocks.
    assert all(len(one.handle._refs) <= 3 for one in crew.queues)
