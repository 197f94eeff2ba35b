"""The units of work of `mask`: `score_block`, or `solve`, for the linears that read one distinct input."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from wanda_dvc.engine import accelerator
from wanda_dvc.engine.checkpoint import Checkpoint
from wanda_dvc.plan import CORRECTION, Plan
from wanda_dvc.pruning.gram import Gram
from wanda_dvc.pruning.masks import BlockSparsity, MaskRule, choose_linear, keeps_all
from wanda_dvc.pruning.reconstruction import check_new_weight, masked, reconstruct, target_weight
from wanda_dvc.pruning.solvers import GramFactors
from wanda_dvc.pruning.statistics import BlockStats
from wanda_dvc.study import tensors
from wanda_dvc.study.files import Json

if TYPE_CHECKING:
    from wanda_dvc.engine.removal import Removal


class MaskJob(NamedTuple):
    """What all blocks of a run share. Nodes of a cluster read the files at the same paths."""

    plan: Plan
    checkpoint: Checkpoint  # of the dense model
    sparsities: Sequence[BlockSparsity]  # by block
    removal: "Removal | None"  # None: the pattern sets weights to zero
    fisher_folder: Path

    def rule(self, block: int) -> MaskRule:
        """Return how masks of a block are chosen."""
        plan, units = self.plan, {}
        if self.removal is not None:
            sets = self.removal.unit_sets
            units = {linear: sets[dimension.unit_set] for linear, dimension in self.removal.consumers.items()}
        group = "row" if plan.group == "row" else "linear"
        fisher = tensors.read_fisher(self.fisher_folder, block) if plan.group == "outputs" else {}
        return MaskRule(plan.method, self.sparsities[block], plan.pattern, group, fisher, units)


class SolverTask(NamedTuple):
    """The linears of a block that read one distinct input."""

    block: int
    name: str  # of the input
    stats: BlockStats  # of this input alone


class BlockResult(NamedTuple):
    """The masks of a block's linears, and new weights if later blocks depend on them."""

    block: int
    masks: tensors.Masks
    weights: dict[str, Tensor]  # by linear, in their stored dtypes
    diagnostics: Json  # solver diagnostics of each


def solve(job: MaskJob, folder: Path, device: torch.device, task: SolverTask) -> BlockResult:
    """Return the result of the linears that read one input, whose Gram matrix is in a block's file in a folder."""
    plan, stats, rule = job.plan, task.stats, job.rule(task.block)
    linears = stats.consumers[task.name]
    gradient_grams: Mapping[str, Gram] = {}
    if plan.mask_reads_gradient_grams:
        gradient_grams = tensors.read_grams(job.fisher_folder, task.block, of=linears)
    device = accelerator.float64_device(device)
    grams = tensors.read_grams(folder, task.block, device, of=[task.name])
    factors = None
    if task.name in grams:  # else no token reached it
        factors = GramFactors(grams[task.name].matrix(), f"Gram matrix of the input of {task.name}")
    masks, weights, diagnostics = dict[str, Tensor](), dict[str, Tensor](), Json()
    for linear in linears:
        transposed = linear in stats.transposed
        stored = job.checkpoint.weight(linear)
        if keeps_all(linear, plan.pattern, rule.units) and plan.propagation != "corrected":
            masks[linear] = torch.ones(stored.shape, dtype=torch.bool)
            continue
        weight = stored.to(device)
        if plan.propagation == "corrected":
            weight = target_weight(
                weight, factors, grams.crosses.get(task.name), strength=CORRECTION, transposed=transposed
            )
        masks[linear] = choose_linear(
            linear, weight, factors if plan.method.needs == "gram" else stats.inputs[task.name], stats, rule
        )
        if plan.mask_stores_weights and factors is not None:
            result = reconstruct(
                weight,
                masks[linear],
                factors,
                reconstruction=plan.used_reconstruction,
                gradient_gram=gradient_grams.get(linear),
                transposed=transposed,
            )
            weights[linear] = check_new_weight(linear, result.weight.to("cpu", stored.dtype))
            diagnostics[linear] = result.diagnostics
    return BlockResult(task.block, tensors.pack_masks(masks), weights, diagnostics)


def combine(job: MaskJob, block: int, results: Iterable[BlockResult]) -> BlockResult:
    """Return a block's result from the results of its solver tasks."""
    combined = BlockResult(block, tensors.Masks(), {}, {})
    for result in results:
        combined.masks.data.update(result.masks.data)
        combined.weights.update(result.weights)
        combined.diagnostics.update(result.diagnostics)
    return remove_units(job, combined)


def score_block(job: MaskJob, block: int, stats: BlockStats, device: torch.device) -> BlockResult:
    """Return the result of a block whose masks are chosen by scores."""
    inputs, rule, stored = stats.by_linear, job.rule(block), job.checkpoint.weight

    def choose(linear: str, weight: Tensor) -> Tensor:
        return choose_linear(linear, weight, inputs[linear], stats, rule)

    masks = {}
    for linear in inputs:
        if keeps_all(linear, rule.pattern, rule.units):
            masks[linear] = torch.ones(stored(linear).shape, dtype=torch.bool)
    scored = [linear for linear in inputs if linear not in masks]
    # On a GPU the next weight is copied while one is scored.
    weights = accelerator.Copies(device).to_device(map(stored, scored))
    if device.type == "cpu":
        with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:  # numpy's partition releases the GIL
            masks |= zip(scored, pool.map(choose, scored, weights), strict=True)
    else:
        masks |= zip(scored, map(choose, scored, weights), strict=True)
    packed = tensors.pack_masks({linear: masks[linear] for linear in inputs})
    return remove_units(job, BlockResult(block, packed, {}, {}))


def remove_units(job: MaskJob, result: BlockResult) -> BlockResult:
    """Return a result whose masks remove all weights of removed units; so far only the masks of their consumers do.

    From the masks of all blocks, `kept_units_of` of `apply` returns which units are kept.
    """
    if job.removal is None:
        return result
    masks = tensors.pack_masks(job.removal.expand_masks(result.masks))
    weights = {linear: masked(weight, masks[linear]) for linear, weight in result.weights.items()}
    return result._replace(masks=masks, weights=weights)
