"""Choose the masks (True is kept), and new weights where they change the inputs of later blocks."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from wanda_dvc.engine import accelerator
from wanda_dvc.engine.checkpoint import Checkpoint
from wanda_dvc.errors import UserError, notice
from wanda_dvc.plan import SMALLER, UNSTRUCTURED, Plan
from wanda_dvc.pruning.allocation import allocate
from wanda_dvc.pruning.gram import Gram
from wanda_dvc.pruning.masks import BlockSparsity, MaskRule, choose_linear, choose_units, keeps_all
from wanda_dvc.pruning.reconstruction import check_new_weight, masked, reconstruct
from wanda_dvc.pruning.selection import count_removed
from wanda_dvc.pruning.solvers import GramFactors
from wanda_dvc.pruning.statistics import BlockStats
from wanda_dvc.reading import is_there
from wanda_dvc.stages import STAGES, inputs, process
from wanda_dvc.stages import device as devices
from wanda_dvc.study import artifact, tensors
from wanda_dvc.study.artifact import Work, check_source, describe, digest, read_provenance
from wanda_dvc.study.files import Json
from wanda_dvc.study.folder import Study

if TYPE_CHECKING:
    from wanda_dvc.engine.cluster import Cluster
    from wanda_dvc.engine.forward import ModelRunner
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
        fisher, costs = tensors.read_fisher(self.fisher_folder, block) if plan.group == "outputs" else ({}, {})
        return MaskRule(plan.method, self.sparsities[block], plan.pattern, group, fisher, costs, units)


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


def mask(*, study: Study) -> None:
    """models/dense + stats/ (+ data/calibration) → masks/, weights/.

    weights/ has blocks only with a reconstruction, and `propagation: pruned` or the repair for blocks: new weights then
    do not follow from the statistics of the dense model.
    """
    plan = study.plan
    device = accelerator.float64_device(devices.own_device(study.params.runtime))  # UserError before any file is read
    norms, digests = inputs.statistics(study)
    inputs.discard_unfinished_gram(study)  # it takes gigabytes
    checkpoint, blocks = Checkpoint(study.model("dense")), artifact.block_count(study.norms, "calibrate")
    if plan.measures_blocks:
        write_best_candidate(study, checkpoint, _describe(plan, norms, digests, [], None), device)
        return
    removal = choose_removal(study, checkpoint, blocks, device)
    sparsities = allocate_sparsities(study, checkpoint, blocks, device)
    made_from = _describe(plan, norms, digests, sparsities, removal)
    job = MaskJob(plan, checkpoint, sparsities, removal, study.fisher.absolute())
    with study.work(made_from) as work:
        write_blocks(study, job, work, made_from, device)
        work.commit(study.masks, study.weights)


def write_blocks(study: Study, job: MaskJob, work: Work, made_from: Json, device: torch.device) -> None:
    """Write the masks of all blocks, and new weights that later blocks depend on, to a work folder."""
    plan, text, blocks = job.plan, made_from["calibration"]["text"], len(job.sparsities)
    masks, weights = work.output("masks"), work.output("weights")
    finished = artifact.finished_blocks(masks)  # the weights of a block are written before
    if job.removal and plan.repairs:
        repair_removed_blocks(study, job.checkpoint, job.removal, text, work)
    if plan.propagates:
        results = on_pruned_blocks(job, *_dense_run(study, text, work), finished, device)
    else:
        results = from_statistics(study, job, range(finished, blocks), device)
    for result in process.progress(results, total=blocks, what="mask, blocks", at=lambda result: result.block):
        # The repair has written the files of the blocks that it may change, empty where it did not help.
        has_file = plan.repairs and is_there(artifact.block_file(weights, result.block))
        if plan.mask_stores_weights and not has_file:
            tensors.write_weights(weights, result.block, result.weights)
        tensors.write_masks(masks, result.block, result.masks)
    artifact.finish(masks, made_from)
    artifact.finish(weights, made_from)


def write_best_candidate(study: Study, checkpoint: Checkpoint, made_from: Json, device: torch.device) -> None:
    """Write the masks of the smaller model with the least measured divergence, and what was measured of the others."""
    # These import transformers, which takes seconds.
    from wanda_dvc.stages.candidates import Candidate, block_candidates, candidates_of_size, measure_candidates

    removal = inputs.removal_of(checkpoint, study.plan, device)
    assert removal is not None  # the pattern removes units
    find = candidates_of_size if study.plan.pattern == SMALLER else block_candidates
    tries, measured, rows = list[tuple[Candidate, Work]](), list[float](), list[Json]()
    sparsities = [study.plan.sparsity] * artifact.block_count(study.norms, "calibrate")
    with study.work(made_from) as work:
        for candidate in find(study, checkpoint, removal, device):
            own_work = Work(work.path / digest(candidate.describe(0.0))[:16])
            job = MaskJob(study.plan, checkpoint, sparsities, candidate.removal, study.fisher.absolute())
            try:
                write_blocks(study, job, own_work, made_from, device)
            except UserError as error:
                if not tries:
                    raise
                notice(f"mask: leaves a candidate out: {error}")
                continue
            tries.append((candidate, own_work))
            for activations in ("own", "dense"):  # of its repair, gigabytes
                artifact.remove(own_work.path / activations)
        for (candidate, _), divergence in zip(tries, measure_candidates(study, tries, work), strict=True):
            measured.append(divergence)
            rows.append(candidate.describe(divergence))
            notice(f"mask: candidate {', '.join(f'{name} {value}' for name, value in rows[-1].items())}")
        if min(measured, default=math.inf) == math.inf:
            raise UserError("sparsity: found no model whose blocks work without the removed ones; set a lower one")
        best, best_work = tries[measured.index(min(measured))]
        chosen = {"config": best.removal.config_changes, "candidates": rows}
        for output in ("masks", "weights"):
            artifact.finish(best_work.output(output), made_from | chosen)
        best_work.commit(study.masks, study.weights)
        work.discard()


def _describe(
    plan: Plan, norms: Json, digests: Json, sparsities: Sequence[BlockSparsity], removal: "Removal | None"
) -> Json:
    libraries = ["torch", "numpy"]
    if plan.propagates or plan.structure:
        libraries.append("transformers")
    if plan.method.package:
        libraries.append(plan.method.package)
    described = describe(
        "mask",
        version=STAGES["mask"].version,
        libraries=tuple(libraries),
        model=norms["model"],
        stats=digest(norms),
        calibration={"text": norms["text"], **norms["params"]},
        params=plan.to_dict(),
        **digests,
    )
    if removal:
        described["config"] = removal.config_changes
    if plan.allocation.name != "uniform":
        described["sparsities"] = [
            {name: float(x) for name, x in sparsity.items()} if isinstance(sparsity, Mapping) else float(sparsity)
            for sparsity in sparsities
        ]
    return described


# --- how much is removed ---


def choose_removal(study: Study, checkpoint: Checkpoint, blocks: int, device: torch.device) -> "Removal | None":
    """Return the units that a pattern removes; None if it sets weights to zero.

    For experts, which ones; for neurons and heads how many, because the masks of the linears that read them choose.
    """
    plan = study.plan
    removal = inputs.removal_of(checkpoint, plan, device)
    if removal is None:
        return None
    notice(f"mask: {removal.describe(plan.sparsity)}")
    if removal.consumers:  # the masks of these linears choose the units
        return removal
    from wanda_dvc.engine.probe import probe  # imports transformers, which takes seconds

    stats = (tensors.read_stats(study.norms, block) for block in range(blocks))
    removal = removal.with_kept(choose_units(removal.unit_sets, stats, plan.method))
    probe(checkpoint, removal, device)  # UserError if a model without these units computes something else
    return removal


def allocate_sparsities(
    study: Study, checkpoint: Checkpoint, blocks: int, device: torch.device
) -> Sequence[BlockSparsity]:
    """Return the sparsity of each block, or of its linears. UserError if a sparsity above 0 removes no weight."""
    plan = study.plan
    if plan.sparsity and plan.pattern == UNSTRUCTURED:
        # Only of block 0: the groups of other blocks have about the same size.
        inputs_of = tensors.read_stats(study.norms, 0).by_linear
        if plan.group == "row":
            largest_group = max(len(x.sum) for x in inputs_of.values())
        else:
            largest_group = max(checkpoint.weight(linear).numel() for linear in inputs_of)
        if not count_removed(largest_group, plan.sparsity):
            problem = f"sparsity: got {float(plan.sparsity):g}, which removes no weight"
            raise UserError(f"{problem}; set a higher sparsity")
    fisher = study.fisher if plan.allocation.uses_fisher else None
    stats = (tensors.read_stats(study.norms, block, fisher=fisher) for block in range(blocks))
    rated = process.progress(stats, total=blocks, what="mask, blocks rated")
    return allocate(checkpoint.weight, rated, blocks, plan.allocation, plan.sparsity, plan.group, device)


# --- the blocks ---


def from_statistics(study: Study, job: MaskJob, blocks: range, device: torch.device) -> Iterator[BlockResult]:
    """Yield each block's result, from the statistics of the dense model.

    Scores are computed in this process: each weight is read once, and networks are slower than disks. Solver tasks may
    run on a cluster.
    """
    if not job.plan.mask_solves:
        for block in blocks:
            yield score_block(job, block, tensors.read_stats(study.norms, block), device)
        return
    tasks = []
    for block in blocks:
        stats = tensors.read_stats(study.norms, block)
        tasks += [SolverTask(block, name, stats.of(name)) for name in stats.consumers]
    results = run_solvers(job, study.gram, tasks, inputs.cluster(study), device)
    for block, of_block in itertools.groupby(results, key=lambda result: result.block):
        yield combine(job, block, of_block)


def run_solvers(
    job: MaskJob, folder: Path, tasks: Sequence[SolverTask], cluster: "Cluster | None", device: torch.device
) -> Iterator[BlockResult]:
    """Return the results of tasks, with Gram matrices in a folder, from this process or from a cluster's nodes."""
    if cluster is None:
        return (solve(job, folder, device, task) for task in tasks)
    # Each node names its own device, and sees the folder at the same absolute path.
    return cluster.map(partial(solve, job, folder.absolute()), tasks, "solver")


def on_pruned_blocks(
    job: MaskJob, run: "ModelRunner", windows: Tensor, finished: int, device: torch.device
) -> Iterator[BlockResult]:
    """Yield the result of each further block, as in the paper: calibrated on the outputs of pruned blocks before it."""
    plan = job.plan
    folder = run.work / "recorded"
    folder.mkdir(exist_ok=True)
    for step in run.forward(windows, finished=finished):
        block, record = step.index, step.record(gram=plan.mask_solves)
        if plan.mask_solves:
            tensors.write_grams(folder, block, record.stats, record.grams, exact=True)
            tasks = [SolverTask(block, name, record.stats.of(name)) for name in record.stats.consumers]
            del record  # before matrices are read, and before the next block's
            result = combine(job, block, run_solvers(job, folder, tasks, run.cluster, device))
            artifact.block_file(folder, block).unlink()
        else:
            result = score_block(job, block, record.stats, device)
        yield result
        # The caller has written the result now. A kill before the change repeats this block, else the next one runs.
        step.change(result.masks, result.weights)


# --- units of work ---


def solve(job: MaskJob, folder: Path, device: torch.device, task: SolverTask) -> BlockResult:
    """Return the result of the linears that read one input, whose Gram matrix is in a block's file in a folder."""
    plan, stats, rule = job.plan, task.stats, job.rule(task.block)
    linears = stats.consumers[task.name]
    gradient_grams: Mapping[str, Gram] = {}
    reconstruction = plan.used_reconstruction
    if plan.mask_stores_weights and reconstruction.uses_fisher:
        gradient_grams = tensors.read_grams(job.fisher_folder, task.block, of=linears)
    device = accelerator.float64_device(device)
    grams = tensors.read_grams(folder, task.block, device, of=[task.name])
    factors = GramFactors(grams[task.name].matrix(), task.name) if task.name in grams else None  # no token reached it
    x = factors if plan.method.is_solver else stats.inputs[task.name]
    masks, weights = dict[str, Tensor](), dict[str, Tensor]()
    for linear in linears:
        transposed = linear in stats.transposed
        stored = job.checkpoint.weight(linear)
        if keeps_all(linear, plan.pattern, rule.units):
            masks[linear] = torch.ones(stored.shape, dtype=torch.bool)
            continue
        weight = stored.to(device)
        masks[linear] = choose_linear(linear, weight, x, stats, rule)
        if plan.mask_stores_weights and factors is not None:
            new = reconstruct(
                weight, masks[linear], factors, reconstruction, gradient_grams.get(linear), transposed=transposed
            )
            weights[linear] = check_new_weight(linear, new.to("cpu", stored.dtype))
    return BlockResult(task.block, tensors.pack_masks(masks), weights)


def combine(job: MaskJob, block: int, results: Iterable[BlockResult]) -> BlockResult:
    """Return a block's result from the results of its solver tasks."""
    combined = BlockResult(block, tensors.Masks(), {})
    for result in results:
        combined.masks.data.update(result.masks.data)
        combined.weights.update(result.weights)
    return remove_units(job, combined)


def score_block(job: MaskJob, block: int, stats: BlockStats, device: torch.device) -> BlockResult:
    """Return the result of a block whose masks are chosen by scores."""
    stats_of, rule = stats.by_linear, job.rule(block)

    def choose(linear: str, weight: Tensor) -> Tensor:
        return choose_linear(linear, weight, stats_of[linear], stats, rule)

    # Only weights that are scored reach a GPU, where the next one is copied meanwhile.
    scored = [linear for linear in stats_of if not keeps_all(linear, rule.pattern, rule.units)]
    weights = accelerator.Copies(device).to_device(map(job.checkpoint.weight, scored))
    if device.type == "cpu":
        with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:  # numpy's partition releases the GIL
            masks = dict(zip(scored, pool.map(choose, scored, weights), strict=True))
    else:
        masks = dict(zip(scored, map(choose, scored, weights), strict=True))
    for linear in stats_of.keys() - masks.keys():
        masks[linear] = choose(linear, job.checkpoint.weight(linear))
    packed = tensors.pack_masks({linear: masks[linear] for linear in stats_of})
    return remove_units(job, BlockResult(block, packed, {}))


def remove_units(job: MaskJob, result: BlockResult) -> BlockResult:
    """Return a result whose masks remove all weights of removed units.

    Of neurons and heads, so far only the masks of the linears that read them do.
    """
    if job.removal is None:
        return result
    masks = tensors.pack_masks(job.removal.expand_masks(result.masks))
    weights = {linear: masked(weight, masks[linear]) for linear, weight in result.weights.items()}
    return result._replace(masks=masks, weights=weights)


# --- runs of the model ---


def _dense_run(study: Study, calibrated_text: Json, work: Work) -> "tuple[ModelRunner, Tensor]":
    """Return a runner of the dense model, and the calibration windows. UserError if they are of another text now."""
    text = read_provenance(study.data("calibration"), "download calibration")
    check_source("stats", calibrated_text, text, "calibrate")
    windows = inputs.draw_calibration(study).tokens
    return inputs.runner(study, "dense", work), windows


def repair_removed_blocks(
    study: Study, checkpoint: Checkpoint, removal: "Removal", calibrated_text: Json, work: Work
) -> None:
    """Write new weights of the block before the first removed one, and of later ones, to the unfinished weights/.

    The file of a block without a better weight has no tensors. An interrupted run reads the blocks that have a file.
    """
    from wanda_dvc.engine.repair import Refit, RefitRun, repair, run_refits  # imports transformers, which takes seconds

    (kept,) = removal.kept_masks.values()  # of the blocks; the first one is kept
    folder, ends = work.output("weights"), [*kept.nonzero()[:, 0].tolist(), len(kept)]
    next_of = {block: end for block, end in itertools.pairwise(ends) if not kept[:end].all()}  # by block that stays
    if all(is_there(artifact.block_file(folder, block)) for block in next_of):
        return
    run, windows = _dense_run(study, calibrated_text, work)

    def refit(refit_run: RefitRun) -> Tensor | None:
        block, _, linear = refit_run.refit
        if not is_there(artifact.block_file(folder, block)):  # else an interrupted run has written it
            new = repair(run, refit_run, checkpoint.weight(linear))
            tensors.write_weights(folder, block, {} if new is None else {linear: new})
        return tensors.read_weights(folder, block).get(linear)

    refits = [Refit(block, end, last_linear(study, run, block)) for block, end in next_of.items()]
    steps = run_refits(run, windows, refits, refit)
    for _ in process.progress(steps, total=len(kept), what="mask, blocks run for the repair", at=int):
        pass


def last_linear(study: Study, run: "ModelRunner", block: int) -> str:
    """Return the last linear of a block that every token reads.

    An expert's linear adds to some tokens only, so it cannot take over what removed blocks add to all of them.
    """
    linears = run.decoder.linears(block)
    called = tensors.read_stats(study.norms, block).by_linear  # in the order in which the block calls its linears
    return [name for name in called if linears[name].slice.expert is None][-1]
