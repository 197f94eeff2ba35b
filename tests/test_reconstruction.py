"""Methods, allocations, patterns and reconstructions, freely combined: what must hold for every row of every table."""

import importlib
import itertools
import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from cases.grids import OF_WEIGHTS, named, pairs, short
from conftest import Make, Patch, calibrate, committed, mask_and_apply, tree, walk

from wanda_dvc.catalog import ALLOCATIONS, RECONSTRUCTIONS, methods
from wanda_dvc.engine.checkpoint import Address, Checkpoint
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.forward import BlockStep
from wanda_dvc.errors import UserError
from wanda_dvc.params import check_params
from wanda_dvc.pruning import solvers
from wanda_dvc.pruning.statistics import BlockStats
from wanda_dvc.results.card import card
from wanda_dvc.stages.apply import apply
from wanda_dvc.stages.inputs import draw_calibration
from wanda_dvc.stages.mask import mask
from wanda_dvc.study import tensors
from wanda_dvc.study.artifact import block_count, block_file
from wanda_dvc.study.files import load_json, write_json
from wanda_dvc.study.folder import Study
from wanda_dvc.study.tensors import read_grams, read_masks, read_stats

NORMS = {"calibration__statistics": "norms"}
PROPAGATIONS = ("dense", "pruned")
PATTERNS: tuple[dict[str, Any], ...] = (
    {}, {"pattern": "2:4"}, {"pattern": "4:8"}, {"pattern": "3:4", "sparsity": 0.25}, {"group": "linear"},
    {"group": "outputs"},
)  # fmt: skip
COMBINATIONS = pairs(PATTERNS, RECONSTRUCTIONS, PROPAGATIONS, OF_WEIGHTS)


def test_no_combination_is_refused():
    settings, choices = committed(), ("reconstruction", "propagation", "method")
    settings["calibration"]["statistics"] = "fisher"
    for pattern, *row in itertools.product(PATTERNS, RECONSTRUCTIONS, PROPAGATIONS, OF_WEIGHTS):
        check_params(settings | pattern | dict(zip(choices, row, strict=True)))


@pytest.mark.parametrize(
    ("pattern", "reconstruction", "propagation", "method"), short(COMBINATIONS, COMBINATIONS[-1]), ids=named
)
def test_masks_are_kept_patterns_exact_and_updates_applied(
    calibrated_study: Make, pattern: dict[str, Any], reconstruction: str, propagation: str, method: str
):
    words = pattern | {"reconstruction": reconstruction, "propagation": propagation}
    made = mask_and_apply(calibrated_study(method=method, **words))
    dense, pruned = Checkpoint(made.model("dense")), Checkpoint(made.model("pruned"))
    n, m = map(int, pattern.get("pattern", "0:0").split(":"))
    text = card(made, load_json(made.metrics("pruned", "sparsity")))
    assert f"{reconstruction}: {RECONSTRUCTIONS[reconstruction].about}" in text
    moved = []
    for block in range(block_count(made.masks, "mask")):
        for name, keep in read_masks(made.masks, block).items():
            before, after = dense.weight(name), pruned.weight(name)
            assert not after[~keep].view(torch.int32).any()  # +0, to the bit
            moved.append(not torch.equal(after[keep], before[keep]))
            if m:
                assert (keep.unflatten(1, (-1, m)).sum(dim=2) == n).all()
            else:
                groups = keep if pattern.get("group", "row") == "row" else keep.reshape(1, -1)
                assert (groups.sum(dim=1) == groups.shape[1] - groups.shape[1] // 2).all()
    assert all(moved) == any(moved) == (RECONSTRUCTIONS[reconstruction].function is not None)
    same = {name: torch.equal(dense.read(Address(name)), pruned.read(Address(name))) for name in dense.file_of}
    assert all(stays for name, stays in same.items() if "layers" not in name or "norm" in name)


def test_gram_matrices_agree_with_the_norms_and_leave_them_alone(calibrated_study: Make):
    made = calibrated_study()
    with_grams = tree(made.norms)
    for block in range(block_count(made.norms, "calibrate")):
        stats, grams = read_stats(made.norms, block), read_grams(made.gram, block)
        input_of = {linear: name for name, linears in stats.consumers.items() for linear in linears}
        assert (grams.input_of, grams.transposed) == (input_of, stats.transposed)
        for name, x in stats.inputs.items():
            torch.testing.assert_close(grams[name].upper.diagonal().sqrt().float(), x.norm)
    calibrate(study=calibrated_study(**NORMS))
    assert tree(made.norms) == with_grams
    assert [*tree(made.gram)] == ["none.json"]


def test_float16_keeps_gram_matrices_to_a_thousandth(calibrated_study: Make, tmp_path: Path):
    made = calibrated_study()
    decoder = Decoder(made.model("dense"), dtype=torch.float32, device=torch.device("cpu"))
    steps = walk(decoder, draw_calibration(made).tokens, tmp_path / "walk")
    step = next(steps)  # whose block stays as long as `steps`
    half = read_grams(made.gram, 0)
    for name, gram in step.record(gram=True).grams.items():
        matrix = gram.matrix()
        scale = matrix.diagonal().sqrt()
        error = (half[name].matrix() - matrix) / scale / scale[:, None]
        assert error.abs().max() <= 2**-11


@pytest.mark.parametrize("method", short(OF_WEIGHTS, "ria"))
def test_wanda_pays_nothing_for_gram_matrices(calibrated_study: Make, method: str):
    """Masks of a method that does not need them do not depend on stats/gram."""
    if methods()[method].needs == "gram":
        assert calibrated_study(method=method, **NORMS).params.statistics == ("norms", "gram")
        return
    made = calibrated_study(method=method)
    mask(study=made)
    before = tree(made.masks)
    shutil.rmtree(made.gram)
    mask(study=calibrated_study(method=method, **NORMS))
    assert tree(made.masks) == before


@pytest.mark.parametrize("allocation", short(ALLOCATIONS, "sensitivity"))
@pytest.mark.parametrize("method", ["admm", "wanda", "magnitude"])
def test_an_allocation_keeps_the_model_s_sparsity(calibrated_study: Make, allocation: str, method: str):
    made = calibrated_study(method=method, allocation=allocation, sparsity=0.6)
    mask(study=made)
    keeps = [keep for block in range(2) for keep in read_masks(made.masks, block).values()]
    zeros = sum(int((~keep).sum()) for keep in keeps)
    total = sum(keep.numel() for keep in keeps)
    if allocation == "uniform":  # every row removes a whole number of weights, rounded down
        assert 0 <= 0.6 * total - zeros <= sum(len(keep) for keep in keeps)
    else:  # the rounding is made up for, to within the rows that lose one weight more together
        assert abs(0.6 * total - zeros) <= sum(len(keep) for keep in keeps) / 4
    blocks = [[keep.float().mean().item() for keep in read_masks(made.masks, block).values()] for block in range(2)]
    assert (abs(sum(blocks[0]) - sum(blocks[1])) < 1e-6) == (allocation == "uniform")


@pytest.mark.parametrize("propagation", ["dense", "pruned"])
@pytest.mark.parametrize("setting", ["group", "allocation", "reconstruction"])
def test_gradients_of_another_calibration_are_refused(calibrated_study: Make, setting: str, propagation: str):
    """By `apply` where the weights alone follow from them."""
    by_apply = (setting, propagation) == ("reconstruction", "dense")
    stage, made_with = (apply, "masks/") if by_apply else (mask, "stats/norms")
    value = {"group": "outputs", "allocation": "sensitivity", "reconstruction": "output-weighted"}[setting]
    made = calibrated_study(**{setting: value}, propagation=propagation)
    if by_apply:
        mask(study=made)
    provenance = made.fisher / "provenance.json"
    content = json.loads(provenance.read_text())
    provenance.unlink()
    write_json(provenance, content | {"params": content["params"] | {"seed": 7}})
    said = f"stats/fisher: found a calibration of .*, expected .* that {made_with} names"
    with pytest.raises(UserError, match=said):
        stage(study=made)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria"])
def test_rows_compete_by_score_times_worth(calibrated_study: Make, method: str):
    made = calibrated_study(method=method, group="outputs")
    mask(study=made)
    checkpoint = Checkpoint(made.model("dense"))
    score = importlib.import_module("wanda_dvc.pruning.scores")
    for block in range(2):
        measured, masks = read_stats(made.norms, block), read_masks(made.masks, block)
        fisher, _ = tensors.read_fisher(made.fisher, block)
        for source, names in measured.consumers.items():
            for name in names:
                scored = getattr(score, method)(checkpoint.weight(name).float(), measured.inputs[source])
                scored = scored.double() * fisher[name][:, None] ** 0.25
                kept, removed = scored[masks[name]], scored[~masks[name]]
                assert len(removed) == scored.numel() // 2
                assert removed.max() <= kept.min() * (1 + 1e-5)


def test_apply_follows_the_plan_of_the_masks(calibrated_study: Make):
    """Not params.yaml's, which may have changed since `mask`."""
    mask_and_apply(calibrated_study(reconstruction="least-squares", propagation="pruned"))
    expected = tree(calibrated_study().model("pruned"))
    apply(study=calibrated_study(reconstruction="sparsegpt"))
    assert tree(calibrated_study().model("pruned")) == expected


def test_weights_of_a_run_before_are_not_taken(calibrated_study: Make, tmp_path: Path):
    """`mask` killed between publishing masks/ and weights/ leaves the old weights/ beside the new masks."""
    mask(study=calibrated_study(reconstruction="sparsegpt", propagation="pruned"))
    shutil.copytree(tmp_path / "weights", tmp_path / "old")

    def again(**changes: Any) -> Study:
        made = calibrated_study(propagation="pruned", **changes)
        mask(study=made)
        shutil.rmtree(made.weights)
        shutil.copytree(tmp_path / "old", made.weights)
        return made

    made = again(reconstruction="none")
    apply(study=made)
    dense, pruned = Checkpoint(made.model("dense")), Checkpoint(made.model("pruned"))
    for block in range(2):
        for name, keep in read_masks(made.masks, block).items():
            assert torch.equal(pruned.weight(name), dense.weight(name) * keep)
    with pytest.raises(UserError, match="weights/: made with other masks, expected those in masks/"):
        apply(study=again(reconstruction="least-squares"))


def test_new_weights_that_are_not_finite_are_refused(calibrated_study: Make, monkeypatch: Patch):
    """As of a solver whose weights overflow in float16."""
    made = calibrated_study(recipe="wanda-refit")
    mask(study=made)
    for solver in ("wanda_dvc.stages.apply.reconstruct", "wanda_dvc.stages.mask.reconstruct"):
        monkeypatch.setattr(solver, lambda weight, *_, **__: weight / 0)
    refused = "proj: new weights are not finite in torch.float32; set reconstruction=none"
    with pytest.raises(UserError, match=refused):
        apply(study=made)
    with pytest.raises(UserError, match=refused):
        mask(study=calibrated_study(recipe="wanda-refit", propagation="pruned"))


def test_apply_opens_a_block_when_it_is_written(calibrated_study: Make, monkeypatch: Patch):
    """Not all blocks before the first tensor: of a large model that is hundreds of gigabytes."""
    made = calibrated_study(recipe="wanda-refit")
    mask(study=made)
    events: list[object] = []
    read_tensor = Checkpoint.read

    def opened(folder: Path, block: int, *, of: Any = None, **kwargs: Any) -> Any:
        events.extend([block] if of is None else [])  # else only the header is read
        return read_grams(folder, block, of=of, **kwargs)

    def read(checkpoint: Checkpoint, address: Address) -> Any:
        events.append(address.tensor)
        return read_tensor(checkpoint, address)

    monkeypatch.setattr("wanda_dvc.stages.apply.read_grams", opened)
    monkeypatch.setattr(Checkpoint, "read", read)
    apply(study=made)
    assert [event for event in events if isinstance(event, int)] == [0, 1]
    written = [event for event in events[: events.index(1)] if isinstance(event, str)]
    assert sum(".layers.0." in tensor for tensor in written) == 7


@pytest.mark.parametrize("places", [(0, 0), (1, 0)])
def test_masks_of_another_block_are_refused(calibrated_study: Make, places: tuple[int, int]):
    """A slip while copying: the other block would be dense, and nothing would say so."""
    made = calibrated_study()
    mask(study=made)
    contents = [block_file(made.masks, block).read_bytes() for block in range(2)]
    for block, place in enumerate(places):
        block_file(made.masks, block).unlink()
        block_file(made.masks, block).write_bytes(contents[place])
    block = next(block for block in range(2) if places[block] != block)
    message = f"block_00{block}.safetensors: found model.layers.{1 - block}.mlp.down_proj, .* expected linears of block"
    with pytest.raises(UserError, match=f"{message} {block}; restore the file with `dvc checkout masks`, or run"):
        apply(study=made)


def test_a_block_with_masks_of_too_few_linears_is_refused(calibrated_study: Make):
    made = calibrated_study(recipe="wanda-refit")
    mask(study=made)
    masks = dict(read_masks(made.masks, 1))
    del masks["model.layers.1.mlp.up_proj"]
    tensors.write_masks(made.masks, 1, tensors.pack_masks(masks))
    with pytest.raises(UserError, match=r"block_001.safetensors: .* differ by model.layers.1.mlp.up_proj; run"):
        apply(study=made)


def test_masks_of_a_linear_without_statistics_are_refused(calibrated_study: Make):
    study = calibrated_study(recipe="wanda-refit")
    mask(study=study)
    stats = read_stats(study.norms, 1)
    consumers = {name: [x for x in linears if "up_proj" not in x] for name, linears in stats.consumers.items()}
    tensors.write_grams(study.gram, 1, BlockStats({}, consumers, []), read_grams(study.gram, 1))
    with pytest.raises(UserError, match=r"expected the linears of .*gram.* differ by model.layers.1.mlp.up_proj;"):
        apply(study=study)


def test_a_resumed_run_writes_the_weights_of_its_own_masks(calibrated_study: Make):
    """A block runs again if the run was killed before its outputs: on another device, its masks may be others."""
    made = calibrated_study(recipe="wanda-refit", propagation="pruned")
    with mock.patch.object(BlockStep, "change", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        mask(study=made)
    (file,) = made.work_root.glob("*/out/weights/*.safetensors")
    tensors.write_weights(file.parent, 0, {})
    mask(study=made)
    assert tensors.read_weights(made.weights, 0)


@pytest.mark.parametrize("propagation", ["dense", "pruned"])
def test_a_matrix_that_cannot_be_factored_is_named(calibrated_study: Make, monkeypatch: Patch, propagation: str):
    """By its input, in `apply` as in `mask`."""
    made = calibrated_study(recipe="wanda-refit", propagation=propagation)
    if propagation == "dense":
        mask(study=made)
    monkeypatch.setattr(solvers, "LARGEST_DAMPING", -1.0)
    with pytest.raises(UserError, match=r"Gram matrix of the input of model.layers.0.\S+_proj: it cannot be factored"):
        mask_and_apply(made) if propagation == "pruned" else apply(study=made)
