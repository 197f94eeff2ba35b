"""Several processes on one study at once, and processes that are killed: no file is lost, torn or of another run."""

import os
import random
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from conftest import Factory, save_tiny_model, tree
from repository import Repository, command_environment

from wanda_dvc.results.listing import list_text
from wanda_dvc.results.report import report
from wanda_dvc.study.folder import Study

KILLS = int(os.environ.get("WANDA_DVC_KILLS", "2"))  # seeds; 30 take ten minutes on two cores
SEEDS = (1, 2)  # of calibration: the settings that alternate


def started(repository: Repository, *words: str, real: bool = False) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words, cwd=repository.root, env=command_environment(real=real), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory: Factory, texts: dict[str, str]) -> Repository:
    """A committed study in which everything has run."""
    model = save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=2)
    settings = texts | {"tasks__limit": 2}
    repository = Repository.new(tmp_path_factory.mktemp("together") / "study", model, settings=settings)
    repository.run("dvc", "repro")
    repository.commit()
    return repository


def outputs_of(root: Path) -> dict[str, bytes]:
    """What a study's stages wrote. DVC spells params.yaml anew."""
    return {name: x for name, x in tree(root).items() if name != "params.yaml"}


@pytest.mark.pipeline
def test_two_repros_and_two_workers_with_a_report_meanwhile(start: Repository, tmp_path: Path):
    """DVC refuses a second `repro` or lets it wait; whatever it does, the end is that of one after the other."""
    expected = {}
    for sparsity in (0.3, 0.7):
        start.repro(sparsity=sparsity)
        expected[sparsity] = outputs_of(start.root)
    shutil.rmtree(start.root / ".dvc/cache/runs")
    start.change(sparsity=0.3)
    both = [started(start, "dvc", "repro") for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert 0 in [process.returncode for process in both], said
    start.run("dvc", "repro")
    assert outputs_of(start.root) == expected[0.3]
    assert start.repro() == set()

    start.run("git", "checkout", "--", ".")
    start.run("dvc", "checkout", "--force")
    shutil.rmtree(start.root / ".dvc/cache/runs")
    for sparsity in (0.3, 0.7):
        start.run("dvc", "exp", "run", "--queue", "--name", f"s{sparsity}", "--set-param", f"sparsity={sparsity}")
    start.run("dvc", "queue", "start", "--jobs", "2")
    workers = started(start, "dvc", "exp", "run", "--run-all", "--jobs", "2")
    study, looks = Study(start.root), 0
    while workers.poll() is None or not looks:
        report(study=study, output=tmp_path / "report.html")
        list_text(study=study)
        looks += 1
        time.sleep(3)
    workers.communicate()
    status = start.run("dvc", "queue", "status")  # DVC's exit code is 0 where an experiment has failed
    assert status.count("Success") == 2, status
    for sparsity in (0.3, 0.7):
        start.run("dvc", "exp", "apply", f"s{sparsity}")
        start.run("dvc", "repro")
        assert outputs_of(start.root) == expected[sparsity]


def stage_of(dvc: psutil.Process, name: str = "") -> list[int]:
    """The processes of the stage that DVC runs, where it is this one."""
    lines = dict[int, list[str]]()
    for one in dvc.children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it ended between two looks
            lines[one.pid] = one.cmdline()
    of_us = {pid: words for pid, words in lines.items() if any("wanda-dvc" in word for word in words[:2])}
    return [pid for pid, words in of_us.items() if not name or name in words]


@pytest.mark.slow
@pytest.mark.pipeline
def test_whatever_is_killed_the_next_repro_ends_with_the_same_bytes(start: Repository, tmp_path: Path):
    """`kill -9` of a victim that the seed draws, early in a stage."""
    repository = replace(start, root=tmp_path / "study")
    shutil.copytree(start.root, repository.root, symlinks=True)
    expected = {}
    made = ("stats", "masks", "models")
    for seed in SEEDS:
        repository.repro("recover", calibration__seed=seed, recovery__tokens=4096)
        expected[seed] = tree(repository.root, *made)
    assert expected[SEEDS[0]] != expected[SEEDS[1]]
    hit = 0
    for number in range(KILLS):
        draw = random.Random(number)
        seed, what = SEEDS[number % len(SEEDS)], draw.choice(("stage", "dvc", "group"))
        shutil.rmtree(repository.root / ".dvc/cache/runs", ignore_errors=True)
        repository.change(calibration__seed=seed, recovery__tokens=4096)
        stage, delay = draw.choice(("calibrate", "mask", "recover")), draw.uniform(0, 1)
        delay *= 8 if stage == "recover" else 1  # its libraries take seconds
        process = started(repository, "dvc", "repro", "recover", real=True)
        dvc = psutil.Process(process.pid)
        with suppress(psutil.NoSuchProcess):  # DVC itself ended
            while process.poll() is None and not stage_of(dvc, stage):
                pass
        try:
            process.communicate(timeout=delay)
        except subprocess.TimeoutExpired:
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                below = [one.pid for one in dvc.children(recursive=True)]
                for pid in {"dvc": [dvc.pid], "stage": stage_of(dvc), "group": [dvc.pid, *below]}[what]:
                    os.kill(pid, signal.SIGKILL)
                    hit += 1
        process.communicate()
        repository.run("dvc", "repro", "recover")
        assert tree(repository.root, *made) == expected[seed], f"seed {number}: {what}"
        assert repository.repro("recover", trained=True) == set()
    assert hit >= KILLS // 2
