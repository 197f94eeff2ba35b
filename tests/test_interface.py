"""The Python interface refuses wrong arguments before anything changes. What it computes: test_experiments.py."""

import contextlib
import shutil
import subprocess
import sys
from pathlib import Path
from threading import Barrier, BrokenBarrierError, Thread
from typing import Any

import pytest
import torch
from conftest import Patch
from test_shape import SLOW_TO_IMPORT
from transformers import AutoModelForCausalLM

import wanda_dvc as wd
from wanda_dvc import interface
from wanda_dvc.study.dvc import repro
from wanda_dvc.study.scaffold import init


def refused(call: Any, *arguments: Any, says: str, **settings: Any) -> None:
    with pytest.raises(wd.UserError, match=says):
        call(*arguments, **settings)


def test_an_argument_of_a_wrong_type_is_named_and_makes_no_study(tiny: Path, tmp_path: Path, monkeypatch: Patch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    refused(wd.calibrate, 7, "new", says="model, tokenizer: found int, NoneType, expected a path, a Hub")
    refused(wd.calibrate, torch.nn.Linear(2, 2), "new", says="model, tokenizer: found Linear")
    refused(wd.calibrate, str(tiny), "new", tokenizer="m", says="tokenizer: found one for a model on disk")
    refused(wd.calibrate, "m/none", "new", says="m/none: missing, or not a directory.*or write m/none@")
    refused(wd.calibrate, str(tiny), "new", sparsity=2, says="sparsity: found 2, expected")
    model = AutoModelForCausalLM.from_pretrained(tiny)
    refused(wd.calibrate, model, "new", says="tokenizer: found LlamaForCausalLM, NoneType")
    refused(wd.calibrate, model, "new", tokenizer=str(tiny), says="tokenizer: found LlamaForCausalLM, str")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_block_that_a_study_does_not_have_is_refused_with_the_range(calibrated: Path):
    study = wd.Study(calibrated)
    for block in (2, -1, "0", None):
        refused(study.statistics, block, says=f"block: found {block!r}, expected 0 to 1")
    assert study.statistics(torch.tensor(1)).inputs  # type: ignore[arg-type] # as a number of NumPy


def test_a_model_or_a_text_that_a_study_does_not_have_is_refused_before_a_setting_changes(
    calibrated: Path, tmp_path: Path
):
    study = wd.Study(shutil.copytree(calibrated, tmp_path / "study", symlinks=True))
    before = (study.path / "params.yaml").read_bytes()
    refused(wd.perplexity, study, "", says="model: found , expected dense, pruned, as", sparsity=0.7)
    refused(wd.perplexity, study, "recovered", says="model: found recovered, expected dense, pruned", sparsity=0.7)
    with pytest.raises(wd.UserError, match="text: found x, expected embedded"):
        wd.perplexity(study, text="x", sparsity=0.7)
    assert (study.path / "params.yaml").read_bytes() == before


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
