"""Blocks by measured divergence, against transformers without those layers and against all sets of blocks."""

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import Make, Patch, fetch, interrupted, tree
from inline import Inline
from transformers import AutoModelForCausalLM

from wanda_dvc.engine import depth, divergence
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.forward import ModelRunner
from wanda_dvc.engine.sequences import TokenSequence
from wanda_dvc.errors import UserError
from wanda_dvc.reading import is_there
from wanda_dvc.stages import run, stage_inputs
from wanda_dvc.stages.calibrate import calibrate
from wanda_dvc.stages.inputs import CHOICES_FILE
from wanda_dvc.stages.mask import mask
from wanda_dvc.study.artifact import remove

BLOCKS = {"pattern": "blocks", "recipe": "wanda"}


@pytest.mark.parametrize("cluster", [Inline(), None], ids=["cluster", "alone"])
def test_divergences_are_those_without_layers(cluster: Inline | None, tiny: Path, tmp_path: Path, monkeypatch: Patch):
    """All groups run in one pass, with and without a common beginning. A top of all tokens makes KL exact."""
    monkeypatch.setattr(divergence, "TOP", 260)
    tokens = torch.randint(0, 256, (2, 41), generator=torch.Generator().manual_seed(1))
    windows = [TokenSequence(x) for x in tokens]
    decoder = Decoder(tiny, dtype=torch.float32, device=torch.device("cpu"))
    runner = ModelRunner(decoder, tmp_path, cluster)  # type: ignore[arg-type]
    groups = [list(group) for number in (1, 2, 3, 4) for group in itertools.combinations(range(4), number)]
    groups[groups.index([1, 3])] = [3, 1]  # the order of a choice is not that of the blocks
    groups = [*groups[::-1], []]
    measured = list(depth.measure_choices(runner, windows, groups, depth.measure_dense(runner, windows)))
    expected = []
    for group in groups:
        model = AutoModelForCausalLM.from_pretrained(tiny)
        with torch.no_grad():
            dense = model(tokens, use_cache=False).logits[:, :-1:4].double().log_softmax(-1)
            model.model.layers = torch.nn.ModuleList(x for i, x in enumerate(model.model.layers) if i not in group)
            other = model(tokens, use_cache=False).logits[:, :-1:4].double().log_softmax(-1)
        expected.append(float((dense.exp() * (dense - other)).sum(-1).mean()))
    assert measured == pytest.approx(expected, rel=1e-4, abs=1e-6)


def table(blocks: int, number: int, seed: int) -> dict[frozenset[int], float]:
    """Divergences without each set of up to a number of blocks: sums of costs, and of what pairs add to them."""
    random = torch.Generator().manual_seed(seed)
    cost, pair = torch.rand(blocks, generator=random), torch.rand(blocks, blocks, generator=random) / 2
    sets = [frozenset(x) for count in range(1, number + 1) for x in itertools.combinations(range(blocks), count)]
    return {
        removed: float(sum(cost[x] for x in removed) + sum(pair[x, y] for x in removed for y in removed if x < y))
        for removed in sets
    }


@pytest.mark.parametrize("seed", range(8))
def test_one_block_more_is_the_best_that_was_measured_and_never_the_first(seed: int):
    blocks, number = 14, 5
    divergences, measured = table(blocks, number, seed), dict[frozenset[int], float]()

    def measure(groups: Sequence[Sequence[int]]) -> list[float]:
        for group in groups:
            assert len({*group}) == len(group)
            assert frozenset(group) not in measured
            measured[frozenset(group)] = divergences[frozenset(group)]
        return [divergences[frozenset(group)] for group in groups]

    choice = depth.no_choice(blocks)
    for count in range(1, number + 1):
        before = choice
        choice = depth.choose_one_more(choice, measure)
        of_number = {removed: x for removed, x in measured.items() if len(removed) == count}
        assert choice.divergence == min(of_number.values()) == divergences[frozenset(choice.removed)]
        assert 0 not in choice.removed
        if count == 1:
            assert of_number.keys() == {frozenset([block]) for block in range(1, blocks)}
            continue
        greedy = min(x for removed, x in of_number.items() if removed > {*before.removed})
        best = next(removed for removed, x in of_number.items() if x == greedy)
        swapped = [removed for removed in of_number if not removed > {*before.removed}]
        assert len(swapped) == depth.RUNNERS_UP * (count - 1)
        assert all(len(removed & best) == count - 1 for removed in swapped)  # one block is put back, one goes
        candidates = min(blocks - count, max(depth.CANDIDATES, blocks // 4))
        assert len(of_number) == candidates + len(swapped)


def test_a_block_without_which_numbers_overflow_stays():
    def measure(groups: Sequence[Sequence[int]]) -> list[float]:
        return [math.inf if {1, 2} & {*group} else float(sum(group)) for group in groups]

    choice = depth.choose_one_more(depth.choose_one_more(depth.no_choice(5), measure), measure)
    assert choice.removed == [3, 4]
    with pytest.raises(UserError, match="without 3 blocks: predictions that are not finite"):
        depth.choose_one_more(choice, measure)


def test_more_blocks_are_measured_anew_and_fewer_are_not(study: Make):
    """That the measured blocks go: tests/test_units.py."""
    made = fetch(study(sparsity=0.25, **BLOCKS), "model", "calibration")
    run("calibrate", study=made)
    half = study(sparsity=0.5, **BLOCKS)
    with pytest.raises(UserError, match="stats/blocks: has choices of up to 1 blocks, expected 2; run"):
        mask(study=half)
    asked = [stage_inputs(study(sparsity=x, **BLOCKS).params)["calibrate/blocks"] for x in (0.1, 0.25, 0.5)]
    assert asked[0] == asked[1] != asked[2]
    without = study(sparsity=0.25, recipe="wanda")
    assert stage_inputs(without.params)["calibrate/blocks"] == {}
    run("calibrate", study=without, variant="blocks")
    assert not is_there(without.blocks / CHOICES_FILE)


def test_a_sparsity_that_removes_no_block_is_refused_before_anything_is_measured(study: Make):
    made = fetch(study(sparsity=0.1, **BLOCKS), "model", "calibration")
    with pytest.raises(UserError, match=r"sparsity: got 0.1, which removes none of the blocks"):
        calibrate(study=made, statistics="blocks")


def test_an_interrupted_measurement_resumes_after_the_last_choice_to_the_same_bytes(study: Make):
    made = fetch(study(sparsity=0.75, **BLOCKS), "model", "calibration")
    calibrate(study=made, statistics="blocks")
    expected = tree(made.root, "stats")
    choices = json.loads((made.blocks / CHOICES_FILE).read_text())["choices"]
    assert [len(choice["removed"]) for choice in choices] == [1, 2, 3]
    for killed in (0, 2):
        remove(made.blocks)
        with interrupted(depth, "measure_choices", at=killed):
            calibrate(study=made, statistics="blocks")
        with mock.patch.object(depth, "choose_one_more", side_effect=depth.choose_one_more) as chosen:
            calibrate(study=made, statistics="blocks")
        assert chosen.call_count == 3 - (killed > 0)
        assert tree(made.root, "stats") == expected
