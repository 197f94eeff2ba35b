"""The cores and memory that this process may use, and the doctor, which finds what is missing and says what to do."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Patch, fetch, write_params, write_settings
from typer.testing import CliRunner

from wanda_dvc import machine
from wanda_dvc.cli import app
from wanda_dvc.commands.doctor import doctor
from wanda_dvc.engine import accelerator
from wanda_dvc.engine.memory import ModelSizes
from wanda_dvc.stages.device import device_name
from wanda_dvc.stages.needs import MEMORY_AND_DISK, requirements
from wanda_dvc.study.folder import Study
from wanda_dvc.study.scaffold import init

affinity = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux restricts a process to cores")


@pytest.fixture
def unset(monkeypatch: Patch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def group(folder: Path, monkeypatch: Patch, line: str, files: dict[str, str]) -> None:
    """A process in a control group, as the system shows it."""
    for name, content in files.items():
        (folder / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "fs" / name).write_text(content)
    (folder / "own").write_text(f"12:memory:/elsewhere\n{line}\n")
    monkeypatch.setattr(machine, "CONTROL_GROUPS", folder / "fs")
    monkeypatch.setattr(machine, "GROUP_OF_PROCESS", folder / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(128)), raising=False)


@affinity
def test_a_process_that_is_bound_to_a_core_uses_that_core():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    code += "from wanda_dvc.machine import cores; print(cores())"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "1"


def test_omp_num_threads_overrides_the_cores(monkeypatch: Patch):
    for given, expected in (("3", 3), ("200", 200), ("5,2", 5)):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert machine.cores() == expected
    for given in ("0", "-1", "many", ""):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert machine.cores() == machine.usable_cores()


@pytest.mark.usefixtures("unset")
@pytest.mark.parametrize(
    ("line", "files", "cores"),
    [
        ("0::/", {"cpu.max": "400000 100000\n"}, 4),
        ("0::/", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/", {"cpu.max": "5000 100000\n"}, 1),
        ("0::/", {"cpu.max": "max 100000\n"}, 128),
        ("0::/slurm/job/step", {"slurm/job/cpu.max": "800000 100000\n", "slurm/job/step/cpu.max": "max 100000\n"}, 8),
        ("0::/a", {"cpu.max": "300000 100000\n", "a/cpu.max": "600000 100000\n"}, 3),
        ("0::/", {"cpu.max": "not a number\n"}, 128),
        ("0::/", {"cpu.max": "100000 0\n"}, 128),
        ("0::/", {}, 128),
        ("", {}, 128),
    ],
)
def test_a_quota_limits_the_cores(tmp_path: Path, monkeypatch: Patch, line: str, files: dict[str, str], cores: int):
    group(tmp_path, monkeypatch, line, files)
    assert machine.cores() == cores


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 5\ninactive_file 100\n"}, 400),
        ({"memory.max": "1000\n", "memory.current": "1200\n", "memory.stat": "anon 5\ninactive_file 0\n"}, 0),
    ],
)
def test_free_memory_is_what_a_group_leaves(tmp_path: Path, monkeypatch: Patch, files: dict[str, str], free: int):
    group(tmp_path, monkeypatch, "0::/", files)
    assert machine.free_memory() == free


@pytest.mark.usefixtures("unset")
def test_a_system_without_affinity_and_control_groups_counts_its_cores(tmp_path: Path, monkeypatch: Patch):
    monkeypatch.setattr(machine, "GROUP_OF_PROCESS", tmp_path / "missing")
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert machine.cores() == os.cpu_count()


def test_a_gpu_multiplies_exactly_and_memory_that_torch_keeps_is_free(monkeypatch: Patch):
    backends: Any = torch.backends
    for new in (False, True):  # torch has two names for it
        torch.set_float32_matmul_precision("medium")
        torch.backends.cudnn.allow_tf32 = True
        if new:
            backends.fp32_precision = backends.cudnn.conv.fp32_precision = "tf32"
        accelerator.disable_tf32()
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)
        assert backends.cudnn.conv.fp32_precision != "tf32"
    for name, found in (("mem_get_info", (100, 1000)), ("memory_reserved", 70), ("memory_allocated", 30)):
        monkeypatch.setattr(torch.cuda, name, lambda _, found=found: found)
    assert accelerator.free_device_memory("cuda") == 140


def test_a_stage_leaves_the_threads_to_omp_num_threads(tmp_path: Path, tiny: Path, monkeypatch: Patch):
    write_params(tmp_path, tiny)
    fetch(Study(tmp_path), "model", "calibration")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    given: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    torch.set_float32_matmul_precision("high")  # as a notebook does
    CliRunner().invoke(app, ["calibrate", "norms"])
    assert (set(given), torch.get_float32_matmul_precision()) == ({7}, "highest")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    init(folder=tmp_path / "study")
    write_params(tmp_path / "study", tmp_path)
    return tmp_path / "study"


def row(table: str, what: str) -> str:
    return next(line for line in table.splitlines() if re.match(rf"\| {re.escape(what)} +\|", line))


def test_a_whole_study_is_well(root: Path):
    before = sorted(root.iterdir())
    table, well = doctor(start=root)
    assert well, table
    for what in ("wanda-dvc", "params.yaml", "cpu", "disk"):
        assert "✓" in row(table, what)
    assert "unknown: run `dvc repro download-model` first" in row(table, "needs")
    assert "Nothing that is needed is missing." in table
    assert sorted(root.iterdir()) == before


def test_a_device_of_workers_is_not_asked_of_this_machine(root: Path, monkeypatch: Patch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    write_params(root, root, runtime__device="cuda")
    assert "runtime.device: got cuda, which this machine lacks" in row(doctor(start=root)[0], "params.yaml")
    write_params(root, root, runtime__device="cuda", runtime__ray="head.invalid:6379")
    assert "runtime.device" not in doctor(start=root)[0]
    monkeypatch.setenv("LOCAL_RANK", "1")  # by `accelerate launch`: memory and models are of the process's own GPU
    assert device_name(Study(root).params.runtime) == "cuda:1"


@pytest.mark.parametrize(
    ("harm", "todo"),
    [
        (lambda root: write_settings(root, root, sparsity=2.0), "found 2.0, expected less than 1"),
        (lambda root: (root / "params.yaml").unlink(), "cd into a study"),
        (lambda root: write_params(root, root, runtime__device="cuda:99"), "which this machine lacks"),
    ],
)
def test_what_is_missing_is_named_with_what_to_do(root: Path, harm, todo: str):
    harm(root)
    table, well = doctor(start=root)
    assert not well
    assert "✗" in row(table, "params.yaml")
    assert todo in row(table, "params.yaml")
    assert re.search(r"Missing: .*params\.yaml", table)


@pytest.mark.parametrize(("free", "well", "tokens"), [(10**6, False, 9), (10**12, True, 0)])
def test_it_says_what_each_stage_needs(root: Path, tiny: Path, monkeypatch: Patch, free: int, well: bool, tokens: int):
    """Too little memory is said; only with too little disk no stage can end well."""
    write_params(root, tiny, recovery__tokens=tokens)
    (root / "models").mkdir()
    (root / "models/dense").symlink_to(tiny)
    monkeypatch.setattr("wanda_dvc.stages.needs.free_memory_of", lambda _: free)
    table, ok = doctor(start=root)
    assert ok
    for stage, memory in (("calibrate", "0.1"), ("zero-shot", "0.2")):
        assert re.search(rf"[✓✗] +\| needs about {memory} GB of memory and .* of disk", row(table, stage))
        assert ("✓" in row(table, stage)) == well
    needs = json.loads(doctor(start=root, as_json=True)[0])["needs"]
    assert needs.keys() == MEMORY_AND_DISK.keys() - (set() if tokens else {"recover"})
    for stage, found in needs.items():
        wanted = requirements(Study(root), stage, ModelSizes.read(tiny))
        assert found == {"memory_bytes": wanted.memory, "disk_bytes": wanted.disk}
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free // 100))
    assert doctor(start=root)[1] == well
