"""The units of work of `mask`: `score_block`, or `solve`, for the linears that read one distinct input."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from wanda_dvc.engine import accelerator
from wanda_dvc.engine.checkpoint import Checkpoint
from wanda_dvc.plan import CORRECTION, Plan
from wanda_dvc.pruning.gram import Gram
from wanda_dvc.pruning.masks import BlockSparsity, MaskRule, choose_block, choose_linear, keeps_all
from wanda_dvc.pruning.reconstruction import check_new_weight, reconstruct, target_weight
from wanda_dvc.pruning.solvers import GramFactors
from wanda_dvc.pruning.statistics import BlockStats
from wanda_dvc.pruning.units import Units
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

    @property
    def units(self) -> dict[str, Units]:
        """The units to remove, by the linear that reads them."""
        if self.removal is None:
            return {}
        sets = self.removal.unit_sets
        return {linear: sets[dimension.unit_set] for linear, dimension in self.removal.consumers.items()}

    def rule(self, block: int) -> MaskRule:
        """Return how masks of a block are chosen."""
        plan = self.plan
        group = "row" if plan.group == "row" else "linear"
        return MaskRule(plan.method, self.sparsities[block], plan.pattern, group, plan.group == "outputs", self.units)


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


def solver_tasks(block: int, stats: BlockStats) -> list[SolverTask]:
    """Return the tasks of a block, one for each distinct input."""
    return [SolverTask(block, name, stats.of(name)) for name in stats.consumers]


def solve_from_file(job: MaskJob, folder: Path, device: torch.device, task: SolverTask) -> BlockResult:
    """Return `solve` with the Gram matrix of a block's file in a folder."""
    device = accelerator.float64_device(device)
    grams = tensors.read_grams(folder, task.block, device, of=[task.name])
    return solve(job, task, grams.get(task.name), grams.crosses.get(task.name), device)


def solve(job: MaskJob, task: SolverTask, gram: Gram | None, cross: Tensor | None, device: torch.device) -> BlockResult:
    """Return the result of the linears that read one input.

    `gram` is the input's Gram matrix, None without tokens, and `cross` its X_denseᵀX, if it was recorded.
    """
    plan = job.plan
    stats = task.stats
    linears = stats.consumers[task.name]
    rule = job.rule(task.block)
    # A task travels to a cluster's node without them.
    if plan.mask_reads_gradient_squares:
        stats = stats._replace(fisher=tensors.read_fisher(job.fisher_folder, task.block))
    gradient_grams: Mapping[str, Gram] = {}
    if plan.mask_reads_gradient_grams:
        gradient_grams = tensors.read_grams(job.fisher_folder, task.block, of=linears)
    factors = None
    if gram is not None:
        factors = GramFactors(gram.matrix().to(device), f"Gram matrix of the input of {task.name}")
    masks, weights, diagnostics = dict[str, Tensor](), dict[str, Tensor](), Json()
    for linear in linears:
        transposed = linear in stats.transposed
        stored = job.checkpoint.weight(linear)
        if keeps_all(linear, plan.pattern, rule.units) and not plan.corrects:
            masks[linear] = torch.ones(stored.shape, dtype=torch.bool)
            continue
        weight = stored.to(device)
        if plan.corrects:
            weight = target_weight(weight, factors, cross, strength=CORRECTION, transposed=transposed)
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


def combine(block: int, results: Iterable[BlockResult]) -> BlockResult:
    """Return a block's result from the results of its solver tasks."""
    whole = BlockResult(block, tensors.Masks(), {}, {})
    for result in results:
        whole.masks.data.update(result.masks.data)
        whole.weights.update(result.weights)
        whole.diagnostics.update(result.diagnostics)
    return whole


def score_block(job: MaskJob, block: int, stats: BlockStats, device: torch.device) -> BlockResult:
    """Return the result of a block whose masks are chosen by scores."""
    if job.plan.mask_reads_gradient_squares:
        stats = stats._replace(fisher=tensors.read_fisher(job.fisher_folder, block))
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    rule = job.rule(block)
    scored = [linear for linear in stats.by_linear if not keeps_all(linear, rule.pattern, rule.units)]
    # On a GPU the next weight is copied while one is scored.
    copies = accelerator.Copies(device).to_device(map(job.checkpoint.weight, scored))
    stored = job.checkpoint.weight  # of a linear that keeps all, only the shape is read
    weights = ((linear, next(copies) if linear in scored else stored(linear)) for linear in stats.by_linear)
    masks = choose_block(weights, stats, rule, threads=threads)
    return BlockResult(block, tensors.pack_masks(masks), {}, {})
