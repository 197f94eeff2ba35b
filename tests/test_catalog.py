"""The tables: what a stage reads, and methods of other packages."""

import dataclasses
import re
import sys
import tomllib
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from pkgutil import resolve_name
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, Make, Patch, calibrate, fetch, planned, write_settings
from safetensors.torch import load_file

from wanda_dvc import catalog
from wanda_dvc.catalog import Method, methods
from wanda_dvc.errors import UserError
from wanda_dvc.pruning.masks import MaskRule, choose_by_score
from wanda_dvc.pruning.statistics import InputStats
from wanda_dvc.stages import run
from wanda_dvc.study.artifact import file_digest, read_provenance
from wanda_dvc.study.folder import Study
from wanda_dvc.study.tensors import read_masks, read_stats


@pytest.mark.parametrize("method", methods().values(), ids=methods())
def test_a_method_is_a_row_and_a_function(method: Method, study: Make):
    assert callable(resolve_name(method.function))
    assert re.fullmatch(r"\[.+\]\(https://\S+\)", method.paper)
    pattern = [*method.patterns, "unstructured"][0]
    made = study(method=method.name, pattern=pattern, calibration__statistics="gram")
    assert made.params.method == method.name


def halves(weight: torch.Tensor, _: InputStats) -> torch.Tensor:
    """Scores in the dtype of the weight, as a method of one's own may return them."""
    return weight.abs()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_scores_may_have_the_dtype_of_the_weight(dtype: torch.dtype, pattern: str):
    magnitude, x = methods()["magnitude"], InputStats.empty(16)
    own = dataclasses.replace(magnitude, function=f"{__name__}:halves")
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    given, expected = (choose_by_score(weight, x, MaskRule(row, Fraction(1, 2), pattern)) for row in (own, magnitude))
    assert torch.equal(given, expected)


def logarithms(weight: torch.Tensor, x: InputStats) -> torch.Tensor:
    return weight.abs().log()


def test_scores_of_minus_infinity_are_refused():
    logarithm = dataclasses.replace(methods()["magnitude"], function=f"{__name__}:logarithms")
    with pytest.raises(UserError, match="scores of method magnitude that are not finite"):
        choose_by_score(torch.tensor([[0.0, 1.0]]), InputStats.empty(2), MaskRule(logarithm, Fraction(1, 2)))


def install(page: str, site: Path) -> None:
    """Install the package that a page of the documentation writes, as pip would: its module and its metadata."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^`my-method/(\S+)`:\n\n```\w+\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    files: dict[str, str] = dict(found)
    assert sum(len(content.splitlines()) for content in files.values()) <= 30
    study = tomllib.loads(files.pop("pyproject.toml"))["project"]
    for name, content in files.items():
        (site / name).write_text(content, encoding="utf-8")
    name, version = study["name"], study["version"]
    metadata = site / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    ((group, entries),) = study["entry-points"].items()
    lines = [f"{name} = {value}\n" for name, value in entries.items()]
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{''.join(lines)}")


def test_the_package_of_the_documentation_adds_a_method(tmp_path: Path, tiny: Path, monkeypatch: Patch):
    """Thirty lines and an entry point: params.yaml takes the method, and `mask` prunes with it."""
    site, calibrated_study = tmp_path / "site", tmp_path / "study"
    site.mkdir()
    calibrated_study.mkdir()
    install("docs/add-a-method.md", site)
    write_settings(calibrated_study, tiny, method="deviation")
    monkeypatch.syspath_prepend(site)
    study = Study(calibrated_study)
    methods.cache_clear()
    try:
        calibrate(study=fetch(planned(study), "model", "calibration"))
        run("mask", study=study)
        made, function = read_provenance(study.masks, "mask"), site / "my_method.py"
        assert (study.source("method").resolve(), made["method"]) == (function, file_digest(function))
        for wrong, said in (("x.nrm", "AttributeError: .*'nrm'; corr"), ("weight[:, 1:]", r"returned .*\], expected")):
            function.write_text(f"{function.read_text()}\n\ndef score(weight, x):\n    return {wrong}\n")
            sys.modules.pop("my_method")
            with pytest.raises(UserError, match=f"method deviation: my_method:score.* {said}"):
                run("mask", study=study)
    finally:
        sys.modules.pop("my_method", None)
        monkeypatch.undo()
        methods.cache_clear()
    assert made["libraries"]["my-method"] == "1.0"
    keep = read_masks(study.masks, 1)["model.layers.1.mlp.up_proj"].numpy()
    x = read_stats(study.norms, 1).inputs["model.layers.1.mlp.gate_proj"]
    dense = load_file(study.model("dense") / "model.safetensors")
    weight = dense["model.layers.1.mlp.up_proj.weight"].double().numpy()
    second, first = x.sum_squares.numpy() / x.count, x.sum.numpy() / x.count
    score = np.abs(weight) * np.sqrt(second - first**2)
    rank = score.argsort(axis=1, kind="stable").argsort(axis=1)
    assert (keep == (rank >= weight.shape[1] // 2)).mean() > 0.999  # float32 may swap two scores that are nearly equal
    by_norm = np.abs(weight) * np.sqrt(second)
    assert (keep != (by_norm.argsort(axis=1).argsort(axis=1) >= weight.shape[1] // 2)).any()


@pytest.mark.parametrize(
    ("loaded", "message"),
    [
        (ImportError("no thing"), r"thing does not load as a method \(no thing\), expected a wanda_dvc.catalog.Method"),
        (5, r"package:thing does not load as a method \(replace.*, expected a wanda_dvc.catalog.Method; fix"),
        (next(iter(methods().values())), "package:thing has the taken name magnitude, expected another; fix or uninst"),
        (methods()["divergence"], "package:thing has the taken name divergence, expected another; fix or uninstall"),
        (replace(methods()["divergence"], name="mine"), "package:thing needs blocks, expected weights, norms or gram"),
    ],
)
def test_an_entry_point_that_is_no_method_is_named(monkeypatch: Patch, loaded: object, message: str):
    entry = mock.Mock(value="package:thing", dist=None, load=mock.Mock(side_effect=[loaded]))
    monkeypatch.setattr(catalog, "entry_points", lambda **_: [entry])
    with pytest.raises(UserError, match=message):
        catalog.methods.__wrapped__()


def test_a_method_without_its_module_is_named(tmp_path: Path, monkeypatch: Patch):
    """Also if a package around the module is missing, or raises an error."""
    (tmp_path / "broken_package.py").write_text("raise ValueError('it is too old')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for module, problem in (
        ("missing_module", "not found"),
        ("missing_package.module", "ModuleNotFoundError: No module named 'missing_package'"),
        ("broken_package.module", "ValueError: it is too old"),
    ):
        method = replace(methods()["wanda"], name="mine", function=f"{module}:score", package="thing")
        with pytest.raises(UserError, match=f"^method mine: {module} of thing: {problem}; reinstall the package$"):
            _ = method.file
    assert {method.file for method in methods().values()} == {"none"}
