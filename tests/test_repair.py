"""The repair for neighbouring blocks that go, against least squares by torch on the hidden states of transformers."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import Make, Patch, calibrate, fetch, prune, tree
from simulated_gpu import simulated_gpu
from test_families import save
from transformers import AutoModelForCausalLM

from wanda_dvc.engine import activations, repair
from wanda_dvc.engine.checkpoint import Checkpoint
from wanda_dvc.engine.load import BlockLoader
from wanda_dvc.errors import UserError
from wanda_dvc.pruning.scores import influence
from wanda_dvc.pruning.units import remove_neighbours
from wanda_dvc.stages.inputs import calibration_windows
from wanda_dvc.stages.mask import mask, repair_before_removed_blocks
from wanda_dvc.study.artifact import remove
from wanda_dvc.study.tensors import read_stats, read_weights

DOWN = "mlp.down_proj"
WANTED: dict[str, Any] = {"pattern": "blocks", "recipe": "wanda-refit", "calibration__windows": 8}


def test_a_finished_block_is_not_repaired_again():
    """It would run the model over all calibration windows."""
    removal = mock.Mock(kept_masks={"blocks": torch.tensor([True, True, False, True])})
    unused = mock.Mock(side_effect=AssertionError)
    assert repair_before_removed_blocks(unused, unused, removal, {}, unused, finished=2) is None


def test_the_linear_before_the_blocks_takes_over_a_part_of_what_they_add(study: Make):
    repaired = prune(fetch(study(sparsity=0.5, calibration__length=128, **WANTED), "model", "calibration"))
    dense, pruned = (Checkpoint(repaired.model(model)) for model in ("dense", "pruned"))
    scores = [influence(read_stats(repaired.stats, block)) for block in range(4)]
    first = min((1, 2), key=lambda block: scores[block] + scores[block + 1])
    kept = [block for block in range(4) if block not in (first, first + 1)]
    model = AutoModelForCausalLM.from_pretrained(repaired.model("dense")).double().eval()
    block = model.model.layers[first - 1]
    inputs: list[torch.Tensor] = []
    hook = block.mlp.down_proj.register_forward_hook(lambda _, args, __: inputs.append(args[0]))
    windows = calibration_windows(repaired)
    final: list[torch.Tensor] = []
    model.model.layers[-1].register_forward_hook(lambda _, __, out: final.append(out))
    with torch.no_grad():
        states = [*model.model(input_ids=windows, output_hidden_states=True).hidden_states[:-1], final.pop()]
    hook.remove()
    after, wanted = states[first], states[first + 2]
    held = torch.arange(8) % 4 == 0

    def fit(rows: torch.Tensor, damping: float) -> torch.Tensor:
        x, r = inputs[0][rows].flatten(0, 1), (wanted - after)[rows].flatten(0, 1)
        gram = x.T @ x
        return torch.linalg.solve(gram + damping * gram.diagonal().mean() * torch.eye(len(gram)), x.T @ r).T

    def error(change: torch.Tensor | float) -> float:
        return float((after + inputs[0] @ (change * torch.ones(32, 48).double()).T - wanted)[held].norm())

    errors = {damping: error(fit(~held, damping)) for damping in repair.DAMPINGS}
    best = min(errors, key=errors.__getitem__)
    weights, diagnostics = read_weights(repaired.weights, first - 1)
    (name,) = weights
    assert name == f"model.layers.{first - 1}.{DOWN}"
    assert diagnostics[name] == {"damping": best, "held_out": pytest.approx(errors[best] / error(0.0), rel=1e-4)}
    expected = dense.weight(name).double() + fit(torch.ones(8, dtype=torch.bool), best)
    torch.testing.assert_close(weights[name].double(), expected, rtol=1e-3, atol=1e-5)
    assert pruned.config.num_hidden_layers == 2
    for new, old in enumerate(kept):
        for linear in (DOWN, "mlp.up_proj", "self_attn.o_proj", "input_layernorm"):
            before = weights.get(f"model.layers.{old}.{linear}", dense.weight(f"model.layers.{old}.{linear}"))
            assert torch.equal(before, pruned.weight(f"model.layers.{new}.{linear}"))


# The last linear that every token reads. A norm follows that of OLMo 2, and experts that of Qwen 3.
END = {"gpt2": "mlp.c_proj", "olmo2": DOWN, "qwen2_moe": "mlp.shared_expert.down_proj", "qwen3_moe": "self_attn.o_proj"}


def test_a_repair_lowers_the_error_on_held_out_windows_or_is_refused(study: Make, tmp_path: Path, monkeypatch: Patch):
    for family, last in END.items():
        model = save(family, tmp_path / family, num_hidden_layers=3)
        repaired = fetch(study(model, sparsity=0.34, calibration__length=64, **WANTED), "model", "calibration")
        calibrate(study=repaired)
        mask(study=repaired)
        ((name, solved),) = read_weights(repaired.weights, 1)[1].items()
        assert name.endswith(f".1.{last}")
        assert solved["held_out"] < 1
    remove(repaired.masks)
    monkeypatch.setattr(repair, "multiply", lambda a, _: torch.ones_like(a))
    with pytest.raises(UserError, match="cannot take over the outputs of"):
        mask(study=repaired)
    model = save("jetmoe", tmp_path / "jetmoe", kv_channels=16)  # all tokens read only what makes keys and values
    repaired = fetch(study(model, sparsity=0.34, calibration__length=64, **WANTED), "model", "calibration")
    calibrate(study=repaired)
    with pytest.raises(UserError, match="self_attention.kv_proj adds nothing to the hidden states"):
        mask(study=repaired)


def test_a_repair_that_is_killed_on_a_gpu_resumes_to_the_same_bytes(study: Make, monkeypatch: Patch):
    """The hidden states before the kill are then in files, and those after it on the GPU."""
    repaired = fetch(study(sparsity=0.5, runtime__device="cuda", **WANTED), "model", "calibration")
    hold = BlockLoader.load

    def killed(loader: BlockLoader, index: int, *rest: Any) -> None:
        if index == 2:
            raise KeyboardInterrupt
        hold(loader, index, *rest)

    monkeypatch.setattr(activations, "SAVED_EVERY", 0)
    with simulated_gpu():
        calibrate(study=repaired)
        mask(study=repaired)
        expected = tree(repaired.root, "masks", "weights")
        for folder in (repaired.masks, repaired.weights):
            remove(folder)
        with mock.patch.object(BlockLoader, "load", killed), pytest.raises(KeyboardInterrupt):
            mask(study=repaired)
        mask(study=repaired)
    assert tree(repaired.root, "masks", "weights") == expected


def test_neighbours_with_the_least_sum_go_and_never_the_first_unit():
    score = torch.tensor([0.0, 3.5, 1.0, 4.0, 2.0, 2.0])
    assert remove_neighbours(score, 4).tolist() == [True, True, True, True, False, False]
    assert remove_neighbours(score, 6).all()
