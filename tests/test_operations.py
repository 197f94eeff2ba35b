"""The number of operations that a stage starts for one block does not grow with the model's width or the data.

On a GPU each operation costs the launch of a kernel: a loop over rows, free on a CPU, takes minutes there. Operations
are counted on the simulated GPU, so that the GPU's own paths count.
"""

from pathlib import Path
from typing import Any

import pytest
from conftest import fetch, save_tiny_model, write_params
from families import save
from simulated_gpu import kernels, simulated_gpu

from wanda_dvc.stages import run
from wanda_dvc.study.folder import Study

Settings = dict[str, Any]
RECIPES: dict[str, Settings] = {  # by label
    "wanda": {"recipe": "wanda"},
    "outputs": {"recipe": "wanda", "group": "outputs"},
    "2:4": {"recipe": "wanda", "pattern": "2:4"},
    "owl": {"recipe": "wanda", "allocation": "owl"},
    "sparsegpt": {"recipe": "sparsegpt"},
    "admm": {"recipe": "admm"},
    "neurons": {"recipe": "wanda-refit", "pattern": "neurons", "sparsity": 0.25},
    "fisher": {"recipe": "fisher"},
}
SIZES = {"width": 64, "length": 32, "windows": 2, "questions": 2}
# What is doubled, the other sizes, and the recipes: masks follow from sums, whatever the number of tokens.
DOUBLED: dict[str, tuple[dict[str, int], list[str]]] = {
    "width": (SIZES, [*RECIPES]),
    "windows": (SIZES | {"windows": 4, "length": 8}, ["wanda"]),  # one chunk
    "length": (SIZES, ["wanda"]),
    "questions": (SIZES, ["wanda"]),
    "experts": (SIZES | {"experts": 4}, ["wanda", "fisher"]),
}
# What may grow, at most how many times as a size doubles, and why.
EXPERT = "each expert's matrix is a linear, with a Gram matrix and a mask of its own"
MAY_GROW: dict[tuple[str, str], tuple[float, str]] = {
    ("width", "mask sparsegpt"): (2.0, "the sweep goes input by input"),
    ("width", "apply sparsegpt"): (2.0, "the same sweep gives the new values"),
}
for _stage in ("perplexity dense", "perplexity pruned"):
    MAY_GROW["windows", _stage] = (2.0, "after the last block, a window of 2,048 tokens is measured in several pieces")
for _stage in ("calibrate norms", "calibrate fisher"):
    MAY_GROW["experts", _stage] = (1.5, EXPERT)
for _stage in ("mask wanda", "mask fisher", "apply wanda", "apply fisher"):
    MAY_GROW["experts", _stage] = (2.0, EXPERT)
for _stage in ("perplexity dense", "perplexity pruned", "zero-shot dense"):
    MAY_GROW["experts", _stage] = (1.1, "the checkpoint stores each expert's matrix alone: each is copied")


def count_kernels(folder: Path, sizes: dict[str, int], recipes: list[str]) -> dict[str, int]:
    """The kernels that each stage starts on a model of two blocks, by stage and recipe, variant or model."""
    folder.mkdir()
    width = sizes["width"]
    if "experts" in sizes:
        save("mixtral", folder / "model", num_local_experts=sizes["experts"])
    else:
        save_tiny_model(folder / "model", num_hidden_layers=2, hidden_size=width, intermediate_size=2 * width)
    texts = [folder / "calibration.txt", folder / "perplexity.txt"]
    for text, sentence in zip(texts, ("A text of letters. ", "Other letters. "), strict=True):
        text.write_text(sentence * 1000, encoding="utf-8")
    settings = {
        "calibration__text__source": str(texts[0]), "perplexity__texts__embedded__source": str(texts[1]),
        "calibration__windows": sizes["windows"], "perplexity__windows": sizes["windows"],
        "calibration__length": sizes["length"], "perplexity__length": sizes["length"],
        "calibration__statistics": "fisher", "tasks__limit": sizes["questions"], "runtime__device": "cuda",
    }  # fmt: skip
    counts: dict[str, int] = {}

    def count_stage(stage: str, label: str, variant: str = "") -> None:
        before = kernels.total()
        run(stage, study=Study(folder), variant=variant)
        counts[f"{stage} {label}"] = kernels.total() - before

    write_params(folder, folder / "model", **settings)
    fetch(Study(folder))
    fetch(Study(folder), "tasks")
    with simulated_gpu():
        for statistics in ("norms", "gram", "fisher"):
            count_stage("calibrate", statistics, statistics)
        for label in recipes:
            write_params(folder, folder / "model", **settings | RECIPES[label])
            count_stage("mask", label)
            count_stage("apply", label)
        for model in ("dense", "pruned"):
            count_stage("perplexity", model, model)
        count_stage("zero-shot", "dense", "dense")
    return counts


@pytest.mark.parametrize("size", DOUBLED)
def test_kernels_do_not_grow_with_the_model_or_the_data(size: str, tmp_path: Path):
    sizes, recipes = DOUBLED[size]
    before = count_kernels(tmp_path / "before", sizes, recipes)
    after = count_kernels(tmp_path / "after", sizes | {size: 2 * sizes[size]}, recipes)
    grown = {}
    for stage, number in after.items():
        factor, _ = MAY_GROW.get((size, stage), (1.0, ""))
        if number > factor * before[stage]:
            grown[stage] = (before[stage], number)
    assert grown == {}
