"""Patterns `smaller` and `blocks`: of several smaller models, each as it would be written, the best one is written."""

import json
import math
import re
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.grids import short
from conftest import Capture, Make, Patch, calibrate, fetch, interrupted, mask_and_apply, prune, save_tiny_model, tree
from families import RECORDED, save
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from wanda_dvc.catalog import RECIPES
from wanda_dvc.commands.prune import settings_for_model
from wanda_dvc.commands.request import check_request
from wanda_dvc.engine import depth, divergence
from wanda_dvc.engine.checkpoint import Checkpoint
from wanda_dvc.engine.memory import ModelSizes
from wanda_dvc.engine.removal import Removal
from wanda_dvc.errors import UserError
from wanda_dvc.params import nested
from wanda_dvc.plan import MEASURED_WINDOWS
from wanda_dvc.stages import candidates
from wanda_dvc.stages import mask as mask_stage
from wanda_dvc.stages.inputs import CHOICES_FILE, draw_calibration, read_choices
from wanda_dvc.stages.mask import mask
from wanda_dvc.study.artifact import read_provenance, remove
from wanda_dvc.study.files import write_json
from wanda_dvc.study.folder import Study
from wanda_dvc.study.tensors import read_fisher

HEADS, NEURONS = "self_attn.o_proj", "mlp.down_proj"


def kept(text: str) -> tuple[int, int]:
    """The kept units and all, of `3/4`."""
    number, total = map(int, text.split("/"))
    return number, total


@pytest.mark.parametrize("sparsity", [0.3, 0.1])
def test_the_best_of_the_measured_candidates_is_written(sparsity: float, study: Make, monkeypatch: Patch):
    """Its divergence is that of the written model, and each prediction that of the statistics."""
    monkeypatch.setattr(divergence, "TOP", 260)  # all tokens: KL is exact
    made = prune(fetch(study(pattern="smaller", sparsity=sparsity, recipe="wanda-refit"), "model", "calibration"))
    rows = read_provenance(made.masks, "mask")["candidates"]
    best = min(rows, key=lambda row: row["divergence"])
    dense, pruned = (Checkpoint(made.model(model)) for model in ("dense", "pruned"))
    assert best["size"] == round(pruned.parameters / dense.parameters, 4) <= 1 - sparsity
    assert pruned.config.num_hidden_layers == kept(best["blocks"])[0]
    assert pruned.config.num_key_value_heads == kept(best["heads"])[0]
    assert pruned.config.intermediate_size == kept(best["neurons"])[0]

    windows = draw_calibration(made, further=1).tokens[:MEASURED_WINDOWS]
    assert not torch.equal(windows, draw_calibration(made).tokens[:MEASURED_WINDOWS])
    log_p = []
    for checkpoint in (dense, pruned):
        model = AutoModelForCausalLM.from_pretrained(checkpoint.folder).eval()
        with torch.no_grad():
            log_p.append(model(windows, use_cache=False).logits[:, : -1 : depth.STRIDE].double().log_softmax(-1))
    kl = (log_p[0].exp() * (log_p[0] - log_p[1])).sum(-1).mean()
    assert best["divergence"] == pytest.approx(float(kl), rel=1e-3)

    measured, choices = read_provenance(made.fisher, "calibrate"), read_choices(made.blocks)
    tokens = measured["windows_back"] * measured["params"]["length"]
    for row in rows:
        (blocks, total), units = kept(row["blocks"]), {HEADS: kept(row["heads"]), NEURONS: kept(row["neurons"])}
        removed = choices[total - blocks - 1].removed if blocks < total else ()
        expected = choices[total - blocks - 1].divergence if blocks < total else 0.0
        for block in set(range(total)) - set(removed):
            costs = read_fisher(made.fisher, block)[1]
            for linear, (stay, all_units) in units.items():
                lowest = costs[f"model.layers.{block}.{linear}"][all_units].sort().values[: all_units - stay]
                expected += float(lowest.sum()) / (2 * tokens)
        assert row["predicted"] == pytest.approx(expected, abs=1e-4)


def test_candidates_are_all_widest_models_that_fit(study: Make, monkeypatch: Patch):
    """By the sizes of models that transformers builds, for all numbers of blocks, heads and neurons."""
    monkeypatch.setattr(candidates, "MEASURED", 100)
    made = prune(fetch(study(pattern="smaller", sparsity=0.25, recipe="wanda"), "model", "calibration"))
    rows = read_provenance(made.masks, "mask")["candidates"]
    names = ("blocks", "heads", "neurons")
    found = {tuple(kept(row[name])[0] for name in names) for row in rows}
    config = Checkpoint(made.model("dense")).config
    full = (config.num_hidden_layers, config.num_key_value_heads, config.intermediate_size)

    def parameters(blocks: int, heads: int, neurons: int) -> int:
        changes: dict[str, Any] = {"num_hidden_layers": blocks, "num_key_value_heads": heads}
        changes |= {"num_attention_heads": 2 * heads, "intermediate_size": neurons, "head_dim": 8}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(type(config)(**config.to_dict() | changes))
        return int(sum(parameter.numel() for parameter in model.parameters()))

    limit, expected = Fraction(3, 4) * parameters(*full), set()
    fewest = full[0] - len(read_choices(made.blocks))
    for heads in range(full[1], 0, -1):
        for blocks in range(full[0], fewest - 1, -1):
            fitting = [width for width in range(1, full[2] + 1) if parameters(blocks, heads, width) <= limit]
            if fitting:
                expected.add((blocks, heads, max(fitting)))
            if full[2] in fitting:  # with as few blocks and fewer heads, the model is smaller than requested
                fewest = blocks + 1
                break
    assert found == expected
    removing = [[name for name in names if len({*kept(row[name])}) == 2] for row in rows]
    order = [(len(some) > 1, row["predicted"]) for some, row in zip(removing, rows, strict=True)]
    assert order == sorted(order)  # first those that remove units of one pattern


def test_a_size_that_no_candidate_has_is_refused_with_the_nearest_two(study: Make):
    made = fetch(study(pattern="smaller", sparsity=0.2, recipe="wanda"), "model", "calibration")
    prune(made)
    again = study(pattern="smaller", sparsity=0.95, recipe="wanda")
    expected = r"sparsity: got 0.95, expected at most 0\.\d+ and 0\.\d+, of the smallest"
    with pytest.raises(UserError, match=expected) as raised:
        mask(study=again)
    (largest,) = re.findall(r"at most (0\.\d+)", str(raised.value))
    mask(study=study(pattern="smaller", sparsity=float(largest), recipe="wanda"))


def test_blocks_that_depend_on_removed_ones_stay(study: Make, tmp_path: Path):
    """GPT-2 may divide attention's scores by the number of the block: without one before it, a block has another."""
    folder = save("gpt2", tmp_path / "model", n_layer=8, scale_attn_by_inverse_layer_idx=True)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():  # attention counts, and without the first blocks little changes
        tensor *= 0.01 if re.search(r"\bh\.[12]\..*c_proj", name) else 12 if "c_attn" in name else 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = {"pattern": "smaller", "sparsity": 0.2, "recipe": "wanda"}
    made = prune(fetch(study(folder, **settings), "model", "calibration"))
    rows = read_provenance(made.masks, "mask")["candidates"]
    assert {row["blocks"] for row in rows} == {"8/8"}


def test_candidates_without_finite_predictions_are_refused(study: Make, monkeypatch: Patch):
    made = fetch(study(pattern="smaller", sparsity=0.2, recipe="wanda"), "model", "calibration")
    calibrate(study=made)
    monkeypatch.setattr(depth, "measure_choices", lambda *_, **__: iter([math.inf]))
    with pytest.raises(UserError, match="sparsity: found no model whose blocks work without the removed ones"):
        mask(study=made)


def test_nothing_is_removed_for_the_size_of_the_dense_model(study: Make):
    made = prune(fetch(study(pattern="smaller", sparsity=0.0, recipe="wanda"), "model", "calibration"))
    (row,) = read_provenance(made.masks, "mask")["candidates"]
    assert (row["size"], row["divergence"]) == (1.0, 0.0)


def test_heads_that_the_class_refuses_are_no_candidate(study: Make, tmp_path: Path):
    """Llama requires that the number of heads divides the width: 6 of 8 heads do not divide 64."""
    folder = save_tiny_model(tmp_path / "wide", hidden_size=64, num_attention_heads=8, num_key_value_heads=4)
    made = prune(fetch(study(folder, pattern="smaller", sparsity=0.1, recipe="wanda"), "model", "calibration"))
    heads = {row["heads"] for row in read_provenance(made.masks, "mask")["candidates"]}
    assert heads <= {"4/4", "2/4", "1/4"}
    assert "4/4" in heads


def test_a_candidate_whose_predictions_are_not_finite_is_not_the_best(study: Make, monkeypatch: Patch):
    made = fetch(study(pattern="smaller", sparsity=0.1, recipe="wanda"), "model", "calibration")
    prune(made)
    number = len(read_provenance(made.masks, "mask")["candidates"])
    measured = iter([*([math.inf] * (number - 1)), 0.5])
    monkeypatch.setattr(depth, "measure_choices", lambda *_: iter([next(measured)]))
    mask(study=made)
    rows = read_provenance(made.masks, "mask")["candidates"]
    assert [row["divergence"] for row in rows] == ["diverged"] * (number - 1) + [0.5]
    assert read_provenance(made.masks, "mask")["config"]["num_hidden_layers"] == kept(rows[-1]["blocks"])[0]


Rises = list[float | None]
RISES: Rises = [None, 0.3, 0.2, 0.4]  # of the tiny model: neighbours 1 and 2 have the least sum
COMPETING: list[tuple[str, Rises, list[float], list[list[int]]]] = [
    ("wanda-refit", RISES, [0.2, 0.1], [[1, 3], [1, 2]]),
    ("wanda-refit", RISES, [0.1, 0.2], [[1, 3], [1, 2]]),
    ("wanda-refit", RISES, [math.inf, 0.2], [[1, 3], [1, 2]]),
    ("wanda-refit", [None, 0.3, 0.7, None], [0.2, 0.1], [[1, 3], [1, 2]]),
    ("wanda-refit", [None, 0.3, None, 0.4], [0.2], [[1, 3]]),  # without block 2: no finite predictions
    ("wanda", RISES, [0.2], [[1, 3]]),  # no repair
]


def calibrated(study: Make, recipe: str, rises: Rises) -> Study:
    """A study whose measured choice of two blocks is 1 and 3."""
    made = fetch(study(pattern="blocks", sparsity=0.5, recipe=recipe), "model", "calibration")
    calibrate(study=made)
    choice = {"removed": [3, 1], "divergence": 0.75, "rises": rises}
    write_json(made.blocks / CHOICES_FILE, {"choices": [choice, choice]})
    return made


def removed_by(removal: Removal) -> list[int]:
    """The blocks that a removal does not keep."""
    (kept,) = removal.kept_masks.values()
    return [block for block, stays in enumerate(kept.tolist()) if not stays]


@pytest.mark.parametrize(("recipe", "rises", "divergences", "expected"), short(COMPETING, COMPETING[2], *COMPETING[4:]))
def test_repaired_neighbours_compete_with_the_measured_blocks(
    recipe: str, rises: Rises, divergences: list[float], expected: list[list[int]], study: Make, monkeypatch: Patch
):
    made = calibrated(study, recipe, rises)
    measured = iter(divergences)
    monkeypatch.setattr(depth, "measure_choices", lambda *_: iter([next(measured)]))
    mask_and_apply(made)
    rows = read_provenance(made.masks, "mask")["candidates"]
    assert [row["removed blocks"] for row in rows] == expected
    sums = [0.75, *(pytest.approx(sum(rises[block] or 0 for block in blocks)) for blocks in expected[1:])]
    assert [row["predicted"] for row in rows] == sums
    best = expected[divergences.index(min(divergences))]
    dense, pruned = (Checkpoint(made.model(model)) for model in ("dense", "pruned"))
    for new, old in enumerate(block for block in range(4) if block not in best):
        weights = [x.weight(f"model.layers.{n}.self_attn.o_proj") for x, n in ((dense, old), (pruned, new))]
        assert torch.equal(*weights)


def test_candidates_without_a_repair_are_left_out_but_the_first(study: Make, monkeypatch: Patch, capsys: Capture):
    made = calibrated(study, "wanda-refit", RISES)
    repair, failing = mask_stage.repair_removed_blocks, [1, 2]

    def fails(study: Any, checkpoint: Any, removal: Any, *args: Any) -> None:
        if removed_by(removal) == failing:
            raise UserError("activations that are not finite")
        repair(study, checkpoint, removal, *args)

    monkeypatch.setattr(mask_stage, "repair_removed_blocks", fails)
    mask(study=made)
    assert "mask: leaves a candidate out: activations that are not finite" in capsys.readouterr().err
    assert [row["removed blocks"] for row in read_provenance(made.masks, "mask")["candidates"]] == [[1, 3]]
    failing[:] = [1, 3]
    remove(made.masks)
    with pytest.raises(UserError, match="activations that are not finite"):
        mask(study=made)


def test_neighbours_that_the_probe_refuses_do_not_compete(study: Make, monkeypatch: Patch):
    made = calibrated(study, "wanda-refit", RISES)

    def refuse(refused: list[int]) -> None:
        def probe(_: Any, removal: Any, __: Any) -> None:
            if removed_by(removal) == refused:
                raise UserError("another model")

        monkeypatch.setattr(candidates, "probe", probe)

    refuse([1, 2])
    mask(study=made)
    (row,) = read_provenance(made.masks, "mask")["candidates"]
    assert row["removed blocks"] == [1, 3]
    refuse([1, 3])
    with pytest.raises(UserError, match="another model"):
        mask(study=made)


@pytest.mark.parametrize("stopped", ["write_blocks", "measure_candidates"])
def test_an_interrupted_choice_resumes_to_the_same_bytes(stopped: str, study: Make):
    made = fetch(study(pattern="smaller", sparsity=0.3, recipe="wanda-refit"), "model", "calibration")
    prune(made)
    expected = [tree(made.masks), tree(made.weights)]
    remove(made.masks)
    remove(made.weights)
    module, call = (mask_stage, 1) if stopped == "write_blocks" else (candidates, 0)
    with interrupted(module, stopped, at=call):
        mask(study=made)
    mask(study=made)
    assert [tree(made.masks), tree(made.weights)] == expected


@pytest.mark.parametrize(
    ("options", "sparsity"),
    [
        ({"size": "80%"}, 0.2), ({"size": "62.5 %"}, 0.375), ({"size": "0.1MB"}, "stored"),
        ({"parameters": "20k"}, "parameters"), ({"parameters": 20_000}, "parameters"),
    ],
)  # fmt: skip
def test_a_size_becomes_a_sparsity(options: dict[str, Any], sparsity: float | str, tiny: Path):
    request, sizes = check_request(model=str(tiny), **options), ModelSizes.read(tiny)
    found = nested(settings_for_model(request, tiny / "config.json", sizes))
    assert (found["pattern"], request.params.recipe) == ("smaller", "fisher")
    expected = sparsity
    if isinstance(sparsity, str):
        expected = 1 - (100_000 / sizes.stored if sparsity == "stored" else 20_000 / sizes.parameters)
    assert math.isclose(found["sparsity"], float(expected))
    limits: list[dict[str, Any]] = [{"size": size} for size in ("1GB", "0MB", "20%")]
    for limit in [*limits, {"parameters": "1B"}, {"parameters": 0}]:
        says = r"--size, --parameters: found .*% of the model, expected more than 2\d\.\d%"
        with pytest.raises(UserError, match=says):
            settings_for_model(check_request(model=str(tiny), **limit), tiny / "config.json", sizes)


@pytest.mark.parametrize(("stored", "said"), [(torch.float16, None), (torch.float32, "float16")])
def test_a_size_in_bytes_is_one_of_stored_tensors(tiny: Path, tmp_path: Path, stored: torch.dtype, said: str | None):
    """config.json may name no dtype, or another one."""
    model = shutil.copytree(tiny, tmp_path / "model")
    tensors = {name: tensor.to(stored) for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    del config["dtype"]
    (model / "config.json").write_text(json.dumps(config | ({"dtype": said} if said else {})))
    whole = sum(tensor.nbytes for tensor in tensors.values())
    request = check_request(model=str(model), size=f"{0.75 * whole / 1e6}MB")
    for place in (model, model / "config.json"):  # of the run, and of a dry run
        found = settings_for_model(request, place, ModelSizes.read(place))
        assert math.isclose(found["sparsity"], 0.25, rel_tol=1e-4)


def test_a_tied_head_that_is_stored_too_counts_for_bytes(tiny: Path, tmp_path: Path):
    """Some models on the Hub store both; the pruned model does too, and no unit is of them."""
    model = shutil.copytree(tiny, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    head = tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    sizes, stored = ModelSizes.read(model), sum(tensor.numel() for tensor in tensors.values())
    assert stored == sizes.parameters + head.numel()
    for options, kept in (({"size": "0.1MB"}, 25_000), ({"parameters": 20_000}, 20_000 + head.numel())):
        found = settings_for_model(check_request(model=str(model), **options), model, sizes)
        assert math.isclose(found["sparsity"], 1 - kept / stored)


@pytest.mark.parametrize("family", short(RECORDED, "falcon"))
def test_every_family_and_recipe_has_a_smaller_model(family: str, study: Make, tmp_path: Path, monkeypatch: Patch):
    monkeypatch.setattr("wanda_dvc.pruning.units.MULTIPLES_OF_A_WIDTH", 4)  # torch multiplies experts by 16 bytes
    folder, recipe = save(family, tmp_path / "model"), [*RECIPES][RECORDED.index(family) % len(RECIPES)]
    made = prune(fetch(study(folder, pattern="smaller", sparsity=0.15, recipe=recipe), "model", "calibration"))
    dense, pruned = (Checkpoint(made.model(model)) for model in ("dense", "pruned"))
    measured = [row["divergence"] for row in read_provenance(made.masks, "mask")["candidates"]]
    assert 1 <= len(measured) <= candidates.MEASURED
    assert all(map(math.isfinite, measured))
    assert pruned.parameters <= 0.85 * dense.parameters
    model = AutoModelForCausalLM.from_pretrained(pruned.folder).eval()
    with torch.no_grad():
        assert model(input_ids=torch.arange(3, 40)[None], use_cache=False).logits.isfinite().all()
