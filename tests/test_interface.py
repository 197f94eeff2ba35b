"""The Python interface refuses wrong arguments before anything changes. What it computes: test_experiments.py."""

import contextlib
import shutil
import subprocess
import sys
from pathlib import Path
from threading import Barrier, BrokenBarrierError, Thread
from typing import Any

import psutil
import pytest
import torch
from command_line import SLOW_TO_IMPORT
from conftest import Patch
from torch import Tensor
from transformers import AutoModelForCausalLM

import wanda_dvc as wd
from wanda_dvc import interface
from wanda_dvc.params import read_params
from wanda_dvc.pruning.statistics import InputStats
from wanda_dvc.study import dvc as study_dvc
from wanda_dvc.study.dvc import repro
from wanda_dvc.study.scaffold import init


def refused(call: Any, *arguments: Any, says: str, **settings: Any) -> None:
    with pytest.raises(wd.UserError, match=says):
        call(*arguments, **settings)


def test_an_argument_of_a_wrong_type_is_named_and_makes_no_study(tiny: Path, tmp_path: Path, monkeypatch: Patch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    refused(wd.calibrate, 7, "new", says="model: found int, expected a path or a Hub id")
    refused(wd.calibrate, "m/none", "new", says="m/none: missing, or not a directory.*or write m/none@")
    refused(wd.calibrate, str(tiny), "new", sparsity=2, says="sparsity: found 2, expected")
    model = AutoModelForCausalLM.from_pretrained(tiny)
    for function in (wd.calibrate, wd.prune):
        refused(function, model, "new", says="model: found LlamaForCausalLM, expected a path or a Hub id; `save_pre")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_path_is_its_name(tiny: Path, tmp_path: Path, monkeypatch: Patch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("wanda_dvc.commands.prune.prune_model", lambda request, shown: request)
    paths = [Path("a.txt"), Path("b.txt"), Path("c.txt")]
    for path in paths:
        path.write_text("text")
    a, b, c = (str(path.absolute()) for path in paths)
    expected: Any = wd.prune(str(tiny), text=[a, b], eval_text=c)
    assert wd.prune(tiny, text=paths[:2], eval_text=paths[2]) == expected


def test_a_block_that_a_study_does_not_have_is_refused_with_the_range(calibrated: Path):
    study = wd.Study(calibrated)
    for block in (2, -1, "0", None):
        refused(study.statistics, block, says=f"block: found {block!r}, expected 0 to 1")
    assert study.statistics(torch.tensor(1)).inputs  # type: ignore[arg-type] # as a number of NumPy


def test_a_model_or_text_that_a_study_lacks_is_refused_before_a_setting_changes(calibrated: Path, tmp_path: Path):
    study = wd.Study(shutil.copytree(calibrated, tmp_path / "study", symlinks=True))
    before = (study.path / "params.yaml").read_bytes()
    refused(wd.perplexity, study, "", says="model: found , expected dense, pruned, as", sparsity=0.7)
    refused(wd.perplexity, study, "recovered", says="model: found recovered, expected dense, pruned", sparsity=0.7)
    with pytest.raises(wd.UserError, match="text: found x, expected embedded"):
        wd.perplexity(study, text="x", sparsity=0.7)
    assert (study.path / "params.yaml").read_bytes() == before


def settings_now(study: wd.Study) -> tuple[str, str, float]:
    params = read_params(study.path / "params.yaml")
    return params.recipe, params.pattern, params.sparsity


def test_no_setting_of_a_call_stays_for_the_next_one(calibrated: Path, tmp_path: Path, monkeypatch: Patch):
    study = wd.Study(shutil.copytree(calibrated, tmp_path / "study", symlinks=True))
    monkeypatch.setattr(interface, "reproduce", lambda *_: None)
    monkeypatch.setattr(wd.Study, "masks", lambda _: {})
    wd.mask(study, pattern="2:4", recipe="admm")
    assert settings_now(study) == ("admm", "2:4", 0.5)
    wd.mask(study, sparsity=0.6)
    assert settings_now(study) == ("wanda", "unstructured", 0.6)
    with interface._changed(wd.Study(study.path), "perplexity", {"perplexity": {"windows": 3}}):
        assert settings_now(study) == ("wanda", "unstructured", 0.6)  # that `perplexity` measures
    with interface._changed(study, "perplexity", {}):
        assert settings_now(study) == ("wanda", "unstructured", 0.6)
        assert read_params(study.path / "params.yaml").perplexity.windows != 3
    wd.mask(study)
    assert settings_now(study) == ("wanda", "unstructured", 0.5)
    path = study.path / "params.yaml"
    path.write_text(path.read_text().replace("sparsity: 0.5", "sparsity: 0.4"))  # an edit by hand stays
    wd.mask(study, pattern="2:4")
    wd.mask(study)
    assert settings_now(study) == ("wanda", "unstructured", 0.4)


def test_calibrating_again_reopens_the_study(tmp_path: Path, monkeypatch: Patch):
    """Also after a call that failed, of a wrong id."""

    def missing(*_: object) -> None:
        raise wd.UserError("model: org/wrong: no such repository")

    monkeypatch.setattr(interface, "reproduce", missing)
    refused(wd.calibrate, "org/wrong", tmp_path / "study", says="org/wrong: no such")
    monkeypatch.setattr(interface, "reproduce", lambda *_: None)
    study = wd.calibrate("org/right", tmp_path / "study", sparsity=0.3)
    first = (study.path / "params.yaml").read_bytes()
    assert read_params(study.path / "params.yaml").model == "org/right"
    monkeypatch.setattr(wd.Study, "masks", lambda _: {})
    wd.mask(study, pattern="2:4")
    assert settings_now(study) == ("fisher", "2:4", 0.3)
    again = wd.calibrate("org/right", tmp_path / "study", sparsity=0.3)
    assert (again.path / "params.yaml").read_bytes() == first
    wd.calibrate("org/right", tmp_path / "study", recipe="admm")
    assert settings_now(study) == ("admm", "unstructured", 0.5)
    (study.path / "params.yaml").write_text((study.path / "params.yaml").read_text().replace("seed: 0", "seed: 7"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").touch()
    refused(wd.calibrate, "org/right", tmp_path / "other", says="other: holds thesis.txt, expected a new or an empty")


def linear_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(32, generator=generator) * 3 + 0.1
    mixing = torch.eye(32) + 0.3 * torch.randn(32, 32, generator=generator)
    return torch.randn(24, 32, generator=generator), (torch.randn(400, 32, generator=generator) * scale) @ mixing


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wanda_on_one_linear_is_its_formula(pattern: str, dtype: torch.dtype):
    weight, inputs = (tensor.to(dtype) for tensor in linear_inputs())
    pruned, mask = wd.prune_linear(weight, inputs, sparsity=0.5, pattern=pattern)
    score = weight.float().abs() * inputs.float().norm(dim=0)
    groups = score.unflatten(1, (-1, 4 if pattern == "2:4" else 32))
    lowest = groups.argsort(dim=2)[:, :, : groups.shape[2] // 2]
    expected = torch.ones_like(groups, dtype=torch.bool).scatter(2, lowest, False).flatten(1)
    assert torch.equal(mask, expected)
    assert pruned.dtype == dtype
    assert torch.equal(pruned, weight * mask)


def test_a_method_sees_the_sums_of_one_linears_inputs(monkeypatch: Patch):
    weight, inputs = linear_inputs()
    seen: list[InputStats] = []

    def score(weight: Tensor, x: InputStats) -> Tensor:
        seen.append(x)
        return weight.abs()

    monkeypatch.setattr("wanda_dvc.pruning.scores.wanda", score)
    wd.prune_linear(weight, inputs)
    (x,) = seen
    assert x.count == len(inputs)
    torch.testing.assert_close(x.sum, inputs.double().sum(dim=0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.sum_squares, inputs.double().square().sum(dim=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", ["wanda-refit", "sparsegpt", "admm"])
def test_a_solver_on_one_linear_is_closer_to_its_output(recipe: str):
    weight, inputs = linear_inputs()
    before = weight.clone()
    pruned, mask = wd.prune_linear(weight, inputs, recipe=recipe)
    assert torch.equal(weight, before)
    assert float(mask.float().mean()) == 0.5
    assert not pruned[~mask].any()
    errors = [((weight - new) @ inputs.T).norm() for new in (pruned, weight * mask)]
    assert errors[0] < 0.9 * errors[1]
    by_gram, gram_mask = wd.prune_linear(weight, gram=inputs.T @ inputs, recipe=recipe)
    assert torch.equal(gram_mask, mask)
    torch.testing.assert_close(by_gram, pruned, rtol=1e-3, atol=1e-3)


def test_what_one_linear_cannot_have_is_refused():
    weight, inputs = linear_inputs()
    refused(wd.prune_linear, weight, inputs, recipe="fisher", says="recipe: found fisher, which reads gradients")
    says = "pattern: found neurons, expected one for a linear"
    refused(wd.prune_linear, weight, inputs, pattern="neurons", says=says)
    refused(wd.prune_linear, weight, inputs, sparsity=2, says="sparsity: found 2, expected less than 1")
    refused(wd.prune_linear, weight, says="inputs, gram: found both or none")
    refused(wd.prune_linear, weight, inputs.T, says=r"found shape \[400, 400\] of XᵀX.* inputs \[tokens, 32\]")
    refused(wd.prune_linear, weight, gram=inputs, says=r"found shape \[400, 32\] of XᵀX")
    refused(wd.prune_linear, weight, inputs / 0, says="values that are not finite")


def test_functions_on_one_study_run_one_after_the_other(calibrated: Path, tmp_path: Path, monkeypatch: Patch):
    study = wd.Study(shutil.copytree(calibrated, tmp_path / "study", symlinks=True))
    barrier, together = Barrier(2), list[bool]()

    def reproduce(*_: object) -> None:
        with contextlib.suppress(BrokenBarrierError):
            barrier.wait(timeout=0.2)
            together.append(True)

    monkeypatch.setattr(interface, "reproduce", reproduce)
    monkeypatch.setattr(wd.Study, "masks", lambda _: {})
    threads = [Thread(target=wd.mask, args=(study,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not together


def test_a_wrong_setting_is_refused_before_libraries_are_imported():
    """Their import takes seconds."""
    code = (
        "import sys, wanda_dvc as wd\n"
        "try: wd.calibrate('org/name', 'new', sparsity=2)\n"
        "except wd.UserError as error: print(error, file=sys.stderr)\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "params.yaml: sparsity: found 2, expected less than 1\n"
    assert not SLOW_TO_IMPORT & set(done.stdout.split())


@pytest.mark.pipeline
def test_all_problems_of_a_stage_that_dvc_runs_are_in_the_error(tmp_path: Path):
    init(folder=tmp_path / "study")
    params = tmp_path / "study/params.yaml"
    params.write_text(params.read_text().replace("sparsity: 0.5", "sparsity: 2\nseed: 1"))
    with pytest.raises(wd.UserError) as caught:
        repro(tmp_path / "study", ["plan"])
    assert [problem.partition(": found")[0] for problem in caught.value.problems] == [
        "params.yaml: sparsity", "params.yaml: seed: no such setting; remove it",
    ]  # fmt: skip


def test_an_interrupted_python_program_leaves_no_stage_running(tmp_path: Path, monkeypatch: Patch):
    # In place of DVC: a process that starts a stage, names both, and runs on.
    (tmp_path / "dvc.py").write_text(
        "import os, signal, subprocess, sys\n"
        "stage = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'])\n"
        "print(os.getpid(), stage.pid, file=sys.stderr, flush=True)\n"
        "signal.pause()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    printed = list[psutil.Process]()

    def stop(line: str) -> None:
        printed.extend(psutil.Process(int(number)) for number in line.split())
        raise KeyboardInterrupt

    monkeypatch.setattr(study_dvc, "notice", stop)
    with pytest.raises(KeyboardInterrupt):
        repro(tmp_path, ["plan"])
    assert len(printed) == 2
    assert not psutil.wait_procs(printed, timeout=10)[1]
