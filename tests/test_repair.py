"""The repair for blocks that go, against least squares by torch on the hidden states of transformers."""

import contextlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Capture, Make, Patch, calibrate, fetch, mask_and_apply, tree
from families import save
from simulated_gpu import simulated_gpu
from transformers import AutoModelForCausalLM

from wanda_dvc.engine import activations, repair, sequences
from wanda_dvc.engine.checkpoint import Checkpoint
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.forward import ModelRunner
from wanda_dvc.engine.load import BlockLoader
from wanda_dvc.errors import UserError
from wanda_dvc.stages import candidates, run
from wanda_dvc.stages.inputs import CHOICES_FILE, draw_calibration
from wanda_dvc.stages.mask import mask
from wanda_dvc.study import tensors
from wanda_dvc.study.artifact import read_provenance, remove, write_provenance
from wanda_dvc.study.files import write_json
from wanda_dvc.study.folder import Study
from wanda_dvc.study.tensors import read_weights

DOWN = "mlp.down_proj"
WANTED: dict[str, Any] = {"pattern": "blocks", "recipe": "wanda-refit", "calibration__windows": 8}


def choose(made: Study, *removed: int) -> None:
    """Choose these blocks, in place of the measured ones and of neighbours."""
    number = len(removed)
    choices = json.loads((made.blocks / CHOICES_FILE).read_text())["choices"]
    choices[number - 1] |= {"removed": removed, "rises": [None] * len(choices[0]["rises"])}
    write_json(made.blocks / CHOICES_FILE, {"choices": choices})


@pytest.mark.parametrize("removed", [(1, 2), (1, 3), (1,), (2,)], ids=str)
def test_linears_take_over_a_part_of_what_removed_blocks_add(removed: tuple[int, ...], study: Make):
    """Those before removed blocks, then each later one, towards the dense model's hidden states."""
    made = fetch(study(sparsity=len(removed) / 4, calibration__length=128, **WANTED), "model", "calibration")
    calibrate(study=made)
    choose(made, *removed)
    repaired = mask_and_apply(made)
    kept = [block for block in range(4) if block not in removed]
    dense, pruned = (Checkpoint(repaired.model(model)) for model in ("dense", "pruned"))
    model = AutoModelForCausalLM.from_pretrained(repaired.model("dense")).double().eval()
    windows, held = draw_calibration(repaired).tokens, torch.arange(8) % 4 == 0
    wanted, _ = states_and_inputs(model, windows)
    layers, new = list(model.model.layers), dict[str, torch.Tensor]()
    for before, end in itertools.pairwise([*kept, 4]):
        if end <= min(removed):
            continue
        model.model.layers = torch.nn.ModuleList(layers[block] for block in kept if block <= before)
        states, inputs = states_and_inputs(model, windows)
        lacking = wanted[end] - states[-1]

        def fit(rows: torch.Tensor, damping: float, inputs: Any = inputs, lacking: Any = lacking) -> torch.Tensor:
            x, r = inputs[rows].flatten(0, 1), lacking[rows].flatten(0, 1)
            gram = x.T @ x
            return torch.linalg.solve(gram + damping * gram.diagonal().mean() * torch.eye(len(gram)), x.T @ r).T

        errors = {x: float((inputs @ fit(~held, x).T - lacking)[held].norm()) for x in repair.DAMPINGS}
        best = min(errors, key=errors.__getitem__)
        weights = read_weights(repaired.weights, before)
        name = f"model.layers.{before}.{DOWN}"
        if not errors[best] < lacking[held].norm():
            assert not weights
            continue
        assert weights.keys() == {name}
        change = fit(torch.ones(8, dtype=torch.bool), best)
        torch.testing.assert_close(weights[name].double(), dense.weight(name).double() + change, rtol=1e-3, atol=1e-5)
        layers[before].mlp.down_proj.weight.data += change
        new |= weights
    assert new
    assert pruned.config.num_hidden_layers == len(kept)
    for number, block in enumerate(kept):
        for linear in (DOWN, "mlp.up_proj", "self_attn.o_proj", "input_layernorm"):
            before_pruning = f"model.layers.{block}.{linear}"
            expected = new.get(before_pruning, dense.weight(before_pruning))
            assert torch.equal(expected, pruned.weight(f"model.layers.{number}.{linear}"))


def states_and_inputs(model: Any, windows: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The hidden states before and after each layer, and the input of the last layer's last linear."""
    states: list[torch.Tensor] = []
    inputs: list[torch.Tensor] = []
    last = model.model.layers[-1]
    hooks = [layer.register_forward_hook(lambda _, args, out: states.append(out)) for layer in model.model.layers]
    hooks.append(model.model.layers[0].register_forward_pre_hook(lambda _, args: states.append(args[0])))
    hooks.append(last.mlp.down_proj.register_forward_hook(lambda _, args, __: inputs.append(args[0])))
    with torch.no_grad():
        model.model(input_ids=windows, use_cache=False)
    for hook in hooks:
        hook.remove()
    return states, inputs[0]


# The last linear that every token reads. A norm follows that of OLMo 2, and experts that of Qwen 3.
END = {"gpt2": "mlp.c_proj", "olmo2": DOWN, "qwen2_moe": "mlp.shared_expert.down_proj", "qwen3_moe": "self_attn.o_proj"}


def test_a_repair_that_does_not_help_is_left_out(study: Make, tmp_path: Path, monkeypatch: Patch, capsys: Capture):
    for family, last in END.items():
        model = save(family, tmp_path / family, num_hidden_layers=3)
        repaired = fetch(study(model, sparsity=0.34, calibration__length=64, **WANTED), "model", "calibration")
        calibrate(study=repaired)
        choose(repaired, 2)
        mask(study=repaired)
        (name,) = read_weights(repaired.weights, 1)
        assert name.endswith(f".1.{last}")
    remove(repaired.masks)
    monkeypatch.setattr(repair, "multiply", lambda a, _: torch.ones_like(a))
    mask(study=repaired)
    assert "keeps its weights: on held-out windows it cannot take over what" in capsys.readouterr().err
    assert read_weights(repaired.weights, 1) == {}
    model = save("jetmoe", tmp_path / "jetmoe", kv_channels=16)  # all tokens read only what makes keys and values
    repaired = fetch(study(model, sparsity=0.34, calibration__length=64, **WANTED), "model", "calibration")
    calibrate(study=repaired)
    with pytest.raises(UserError, match="self_attention.kv_proj adds nothing to the hidden states"):
        mask(study=repaired)


@pytest.mark.parametrize("model", ["dense", "own"])
def test_activations_that_are_not_finite_stop_a_repair(tiny: Path, tmp_path: Path, monkeypatch: Patch, model: str):
    """Of the dense model, and of the model without the removed blocks."""
    decoder = Decoder(tiny, dtype=torch.float32, device=torch.device("cpu"))
    write = activations.ActivationStore.write

    def overflowing(store: activations.ActivationStore, block: int, chunk: int, batches: Any) -> None:
        if store.folder.name == model and block == 2:
            batches = [x * torch.inf for x in batches]
        write(store, block, chunk, batches)

    monkeypatch.setattr(activations.ActivationStore, "write", overflowing)
    refits = [repair.Refit(0, 2, f"model.layers.0.{DOWN}"), repair.Refit(2, 4, f"model.layers.2.{DOWN}")]
    windows = torch.ones(2, 8, dtype=torch.int64)
    steps = repair.run_refits(ModelRunner(decoder, tmp_path), windows, refits, lambda _: None)
    with pytest.raises(UserError, match="block 2, run for the repair: activations that are not finite; set dtype"):
        list(steps)


def test_gram_matrices_of_another_calibration_do_not_stop_a_repair(calibrated_study: Make):
    """Nothing reads them."""
    made = calibrated_study(pattern="blocks", recipe="wanda-refit", sparsity=0.5)
    run("calibrate", study=made, variant="blocks")
    write_provenance(made.gram, read_provenance(made.gram, "calibrate") | {"params": {}})
    mask_and_apply(made)
    assert Checkpoint(made.model("pruned")).config.num_hidden_layers == 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_repair_that_is_killed_resumes_to_the_same_bytes(study: Make, monkeypatch: Patch, device: str):
    """On a GPU the hidden states before the kill are then in files, and those after it on the device."""
    repaired = fetch(study(sparsity=0.25, runtime__device=device, **WANTED), "model", "calibration")
    load, write, calls = BlockLoader.load, tensors.write_weights, itertools.count()

    def loaded(*args: Any) -> None:
        if at == "load" and next(calls) == kill:
            raise KeyboardInterrupt
        load(*args)

    def written(*args: Any) -> None:
        write(*args)
        if at == "write" and next(calls) == kill:
            raise KeyboardInterrupt

    monkeypatch.setattr(activations, "SAVED_EVERY", 0)
    monkeypatch.setattr(candidates, "probe", lambda *_: None)  # it loads blocks too
    monkeypatch.setattr(BlockLoader, "load", loaded)
    monkeypatch.setattr(tensors, "write_weights", written)
    monkeypatch.setitem(sequences.SMALLEST_CHUNK, "cuda", 1)  # several
    with simulated_gpu() if device == "cuda" else contextlib.nullcontext():
        at, kill = "load", -1
        calibrate(study=repaired)
        choose(repaired, 1)
        calls = itertools.count()
        mask(study=repaired)
        expected, loads = tree(repaired.root, "masks", "weights"), next(calls)
        # Between the runs of blocks and the trials of dampings, and before a new weight is used.
        loading = [("load", 1 + part * (loads - 2) // 5) for part in range(6)]
        for point in [*loading, ("write", 0), ("write", 1), ("write", 2)]:
            at, kill = point
            for folder in (repaired.masks, repaired.weights):
                remove(folder)
            calls = itertools.count()
            with pytest.raises(KeyboardInterrupt):
                mask(study=repaired)
            mask(study=repaired)
            assert tree(repaired.root, "masks", "weights") == expected
