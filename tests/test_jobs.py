"""Masks and weights that workers solve for have the bytes of one process, whoever ends first and whoever dies."""

import contextlib
import importlib
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny_model, write_params
from test_families import save
from test_pool import Shuffled
from test_stages import fetch, tree

from wanda_dvc.catalog import RECONSTRUCTIONS, methods
from wanda_dvc.engine.jobs import Ask, LocalJobs
from wanda_dvc.engine.pool import AHEAD, Crew, Hired, Staff
from wanda_dvc.engine.worker import Order
from wanda_dvc.errors import UserError
from wanda_dvc.stages import inputs
from wanda_dvc.stages.calibrate import calibrate
from wanda_dvc.stages.mask import mask
from wanda_dvc.study.project import Project

stage: Any = importlib.import_module("wanda_dvc.stages.mask")
Settings = dict[str, Any]

SOLVERS = [name for name, method in methods().items() if method.competition == "solver"]
DENSE: list[Settings] = [{"method": name} | pattern for name in SOLVERS for pattern in ({}, {"pattern": "2:4"})]
# Every method, every reconstruction that a worker can do, and both propagations.
SOLVED = [name for name, row in RECONSTRUCTIONS.items() if row.function and not row.trains]
PROPAGATED: list[Settings] = [
    {"method": method, "reconstruction": reconstruction, "propagation": propagation}
    for method, (reconstruction, propagation) in zip(
        methods(), itertools.cycle(itertools.product(SOLVED, ("corrected", "pruned"))), strict=False
    )
] + [{"method": name, "propagation": "pruned"} for name in SOLVERS]
CALIBRATION: Settings = {"calibration__statistics": "fisher", "calibration__samples": 3}


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory, texts: dict[str, str]) -> Callable[[str], Project]:
    """A study of a model, with its Gram matrices."""
    made: dict[str, Project] = {}

    def make(model: str) -> Project:
        if model not in made:
            folder = tmp_path_factory.mktemp("source") / model
            source = save_tiny_model(folder, num_hidden_layers=2) if model == "llama" else save(model, folder)
            root = tmp_path_factory.mktemp(model)
            write_params(root, source, **CALIBRATION, **texts)
            made[model] = fetch(Project(root), "model", "calibration")
            calibrate(project=made[model])
        return made[model]

    return make


Run = Callable[..., dict[str, bytes]]


@pytest.fixture
def run(calibrated: Callable[[str], Project], texts: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the stage anew, with a crew or in this process; returns what it made."""
    monkeypatch.setattr(stage, "check_ready", lambda *_: None)  # it looks for Ray

    def made(
        crew: Shuffled | None = None, *, model: str = "llama", again: bool = True, **changes: Any
    ) -> dict[str, bytes]:
        @contextlib.contextmanager
        def crewed(_: Any, *, beside: Callable[[], Any], most: int | None = None) -> Iterator[Any]:
            yield crew, beside()

        monkeypatch.setattr(inputs, "_crew", crewed)
        study = calibrated(model)
        settings = CALIBRATION | texts | changes
        write_params(study.root, study.params.model, runtime__ray="auto" if crew else None, **settings)
        for folder in (study.masks, study.weights, *([study.work_root] if again else [])):
            shutil.rmtree(folder, ignore_errors=True)
        mask(project=Project(study.root))
        return tree(study.masks) | {f"weights/{name}": content for name, content in tree(study.weights).items()}

    return made


def named(changes: Settings) -> str:
    return "-".join(map(str, changes.values()))


def jobs(crew: Shuffled) -> list[Any]:
    """What was asked of each job that was begun."""
    return [words[3] for words in crew.said if words[0] == "job"]


@pytest.mark.slow
@pytest.mark.parametrize("changes", DENSE + PROPAGATED, ids=named)
def test_any_number_of_workers_gives_the_bytes_of_one_process(run: Run, changes: Settings):
    expected = run(**changes)
    for workers in (1, 2, 5):
        crew = Shuffled(workers, seed=workers)
        assert run(crew, **changes) == expected
        assert len(jobs(crew)) == 2 * 4  # blocks, and distinct inputs of each


@pytest.mark.slow
@pytest.mark.parametrize("changes", [DENSE[0], PROPAGATED[0]], ids=named)
@pytest.mark.parametrize("model", ["gpt2", "qwen3_moe"])
def test_stored_across_or_by_expert_a_weight_is_the_same(run: Run, model: str, changes: Settings):
    """Of twelve experts some have no token, and so no Gram matrix."""
    assert run(Shuffled(2), model=model, **changes) == run(model=model, **changes)


@pytest.mark.parametrize("changes", [DENSE[0], PROPAGATED[0]], ids=named)
def test_a_worker_that_dies_costs_its_jobs_and_no_byte(run: Run, capsys: pytest.CaptureFixture[str], changes: Settings):
    """All of them start again at once, and not each when it is waited for."""
    calls = itertools.count()
    crew = Shuffled(3, kill=lambda words: words[0] == "job" and next(calls) == 5)
    assert run(crew, **changes) == run(**changes)
    assert len(crew.queues) == 2
    assert capsys.readouterr().err.count(": gone; ") == 1


def test_the_last_worker_that_dies_is_replaced(run: Run):
    calls = itertools.count()
    crew = Shuffled(1, kill=lambda words: words[0] == "job" and next(calls) == 5)
    assert run(crew, **DENSE[0]) == run(**DENSE[0])


def test_a_job_that_kills_every_worker_ends_the_stage(run: Run):
    crew = Shuffled(4, kill=lambda words: words[0] == "job" and "down_proj" in next(iter(words[3].stats.readers)))
    said = r"^worker on node \d: died at block 0, input of \S+down_proj, as 2 before it \(killed\), expected it"
    with pytest.raises(UserError, match=said):
        run(crew, **DENSE[0])


class Elsewhere(Shuffled):
    """Workers on machines that have no files of the study."""

    def hire(self, most: int, asked: Order) -> list[Hired]:
        elsewhere = type(asked)(**vars(asked) | {"folders": dict.fromkeys(asked.folders, "another one")})
        return super().hire(most, elsewhere)


@pytest.mark.parametrize("changes", [DENSE[0], PROPAGATED[0]], ids=named)
def test_workers_without_the_files_are_sent_what_others_read(run: Run, changes: Settings):
    there, elsewhere = Shuffled(2), Elsewhere(2)
    assert run(there, **changes) == run(elsewhere, **changes) == run(**changes)
    dense = "propagation" not in changes
    for crew, sent in ((there, False), (elsewhere, True)):
        for part in jobs(crew):
            assert isinstance(part.weights, dict) == sent
            assert isinstance(part.grams, tuple) == (dense and not sent)


def overflows(*_: Any) -> Any:
    raise UserError("down_proj: Gram matrix: values that are not finite")


def test_an_error_of_a_job_is_ours_with_the_nodes_name(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stage, "solve", overflows)
    with pytest.raises(UserError, match=r"^worker on node 0: down_proj: Gram matrix: values that are not finite$"):
        run(Shuffled(1), **DENSE[0])


@pytest.mark.parametrize("changes", [DENSE[0], PROPAGATED[0]], ids=named)
def test_a_killed_run_goes_on_from_its_finished_blocks(run: Run, monkeypatch: pytest.MonkeyPatch, changes: Settings):
    expected, written, crew = run(**changes), stage.write_masks, Shuffled(2)

    def killed(folder: Path, block: int, *content: Any) -> None:
        if block == 1:
            raise KeyboardInterrupt
        written(folder, block, *content)

    monkeypatch.setattr(stage, "write_masks", killed)
    with pytest.raises(KeyboardInterrupt):
        run(Shuffled(2), **changes)
    monkeypatch.setattr(stage, "write_masks", written)
    assert run(crew, again=False, **changes) == expected
    assert len(jobs(crew)) == 4  # of the second block alone


def double(_: torch.device, asked: int) -> int:
    return 2 * asked


@pytest.mark.parametrize("workers", [1, 3])
def test_few_jobs_are_taken_ahead(workers: int):
    """So the driver holds a bounded number of Gram matrices, however many blocks there are."""
    taken = 0

    def asked() -> Iterator[Ask[int]]:
        nonlocal taken
        for taken in range(1, 51):
            yield Ask(str(taken), taken, taken)

    staff = Staff(order=Order({}), crew=Shuffled(workers))
    for number, found in enumerate(staff.each(double, asked()), start=1):
        assert found == 2 * number
        assert taken <= number + AHEAD * workers
    assert list(LocalJobs(torch.device("cpu")).each(double, asked())) == [2 * x for x in range(1, 51)]


class OneIsSlow(Crew):
    """A crew whose first worker ends nothing before somebody waits for it."""

    def __init__(self) -> None:
        self.calls = dict.fromkeys(("slow", "quick", "quicker"), 0)

    def hire(self, most: int, asked: Order) -> list[Hired]:
        return [Hired(None, name, True) for name in self.calls]

    def call(self, worker: Hired, *words: Any) -> Any:
        self.calls[worker.name] += 1
        return worker, words

    def get(self, ticket: Any) -> Any:
        _, (_, _, function, asked) = ticket
        return function(torch.device("cpu"), asked)

    def ended(self, ticket: Any) -> bool:
        return ticket[0].name != "slow"

    def put(self, content: Any) -> Any:
        return content

    def dismiss(self, worker: Hired) -> None:
        raise NotImplementedError


def test_whoever_has_the_least_to_do_is_asked_next():
    crew = OneIsSlow()
    staff = Staff(order=Order({}), crew=crew)
    assert list(staff.each(double, (Ask(str(x), x, x) for x in range(60)))) == [2 * x for x in range(60)]
    assert 3 * crew.calls["slow"] < crew.calls["quick"] + crew.calls["quicker"]
