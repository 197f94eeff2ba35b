"""Masks and weights that tasks solve for have the bytes of one process."""

import importlib
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cases.grids import OF_WEIGHTS
from conftest import calibrate, planned, save_tiny_model, write_params
from inline import Inline
from test_families import save
from test_stages import fetch, tree

from wanda_dvc.catalog import RECONSTRUCTIONS, methods
from wanda_dvc.engine.rows import Executor
from wanda_dvc.stages import inputs
from wanda_dvc.stages.mask import mask
from wanda_dvc.study.project import Project

stage: Any = importlib.import_module("wanda_dvc.stages.mask")
Settings = dict[str, Any]

SOLVERS = [name for name, method in methods().items() if method.needs == "gram"]
NEURONS: Settings = {"pattern": "neurons", "sparsity": 0.25}
DENSE: list[Settings] = [
    {"method": name} | pattern for name in SOLVERS for pattern in ({}, {"pattern": "2:4"}, NEURONS)
]
# Every method, every reconstruction that a worker can do, and both propagations.
SOLVED = [name for name, row in RECONSTRUCTIONS.items() if row.function and not row.trains]
PROPAGATED: list[Settings] = [
    {"method": method, "reconstruction": reconstruction, "propagation": propagation}
    for method, (reconstruction, propagation) in zip(
        OF_WEIGHTS, itertools.cycle(itertools.product(SOLVED, ("corrected", "pruned"))), strict=False
    )
] + [{"method": name, "propagation": "pruned"} | pattern for name in SOLVERS for pattern in ({}, NEURONS)]
TRAINED: list[Settings] = [
    {"reconstruction": name, "propagation": "pruned"} for name, row in RECONSTRUCTIONS.items() if row.trains
]
CALIBRATION: Settings = {"calibration__statistics": "gradients", "calibration__windows": 3}


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
            made[model] = fetch(planned(Project(root)), "model", "calibration")
            calibrate(project=made[model])
        return made[model]

    return make


Run = Callable[..., dict[str, bytes]]


@pytest.fixture
def run(calibrated: Callable[[str], Project], texts: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the stage anew, on a cluster or in this process; returns what it made."""
    on_ray = inputs.executor

    def made(
        cluster: Inline | None = None, *, model: str = "llama", again: bool = True, **changes: Any
    ) -> dict[str, bytes]:
        def opened(*words: Any) -> Executor:
            return cluster or on_ray(*words)

        monkeypatch.setattr(inputs, "executor", opened)
        monkeypatch.setattr(stage, "executor", opened)
        study = calibrated(model)
        settings = CALIBRATION | texts | changes
        write_params(study.root, study.params.model, runtime__ray="auto" if cluster else None, **settings)
        for folder in (study.masks, study.weights, *([study.work_root] if again else [])):
            shutil.rmtree(folder, ignore_errors=True)
        mask(project=planned(Project(study.root)))
        return tree(study.masks) | {f"weights/{name}": content for name, content in tree(study.weights).items()}

    return made


def named(value: Settings) -> str:
    return "-".join(map(str, value.values()))


def solved(cluster: Inline) -> list[str]:
    """The solvers that ran."""
    return [name for name, _ in cluster.ran if "solver" in name]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [*DENSE, *PROPAGATED, *TRAINED], ids=named)
def test_tasks_give_the_bytes_of_one_process(run: Run, changes: Settings):
    cluster = Inline()
    assert run(cluster, **changes) == run(**changes)
    if changes not in TRAINED:
        assert len(solved(cluster)) == 2 * 4  # blocks, and distinct inputs of each


@pytest.mark.slow
@pytest.mark.parametrize("changes", [DENSE[0], PROPAGATED[0]], ids=named)
@pytest.mark.parametrize("model", ["gpt2", "qwen3_moe"])
def test_stored_across_or_by_expert_a_weight_is_the_same(run: Run, model: str, changes: Settings):
    """Of twelve experts some have no token, and so no Gram matrix."""
    assert run(Inline(), model=model, **changes) == run(model=model, **changes)


@pytest.mark.parametrize("changes", [DENSE[0], PROPAGATED[0]], ids=named)
def test_a_killed_run_resumes_after_its_finished_blocks(run: Run, monkeypatch: pytest.MonkeyPatch, changes: Settings):
    expected, written, cluster = run(**changes), stage.write_masks, Inline()

    def killed(folder: Path, block: int, *content: Any) -> None:
        if block == 1:
            raise KeyboardInterrupt
        written(folder, block, *content)

    monkeypatch.setattr(stage, "write_masks", killed)
    with pytest.raises(KeyboardInterrupt):
        run(Inline(), **changes)
    monkeypatch.setattr(stage, "write_masks", written)
    assert run(cluster, again=False, **changes) == expected
    assert len(solved(cluster)) == 4  # of the second block alone
