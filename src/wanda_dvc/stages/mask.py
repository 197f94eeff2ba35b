"""Choose the masks (True is kept), and new weights where they change the inputs of later blocks."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import ROUND_CEILING, Context
from fractions import Fraction
from functools import partial
from pkgutil import resolve_name
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from wanda_dvc.engine import accelerator
from wanda_dvc.engine.checkpoint import Checkpoint
from wanda_dvc.errors import UserError, notice
from wanda_dvc.plan import UNSTRUCTURED, Plan
from wanda_dvc.pruning.allocation import allocate, competitions_of_block
from wanda_dvc.pruning.masks import BlockSparsity, choose_units, linear_sparsity
from wanda_dvc.pruning.reconstruction import masked
from wanda_dvc.pruning.selection import count_removed
from wanda_dvc.pruning.statistics import BlockStats
from wanda_dvc.pruning.units import multiple_of, removing_sparsity
from wanda_dvc.stages import STAGES, inputs, process
from wanda_dvc.stages import device as devices
from wanda_dvc.stages.solving import MaskJob, SolverOutput, score_block, solve, solve_from_file, solver_tasks
from wanda_dvc.study import artifact, tensors
from wanda_dvc.study.artifact import Work, check_source, describe, digest, read_provenance
from wanda_dvc.study.files import Json
from wanda_dvc.study.folder import Study

if TYPE_CHECKING:
    from wanda_dvc.engine.forward import ModelRunner
    from wanda_dvc.engine.removal import Removal
    from wanda_dvc.engine.sums import BlockRecord

ROUNDING_NOTICED = Fraction(1, 1000)  # a sparsity is reported as rounded if it differs by more
HINT_CONTEXT = Context(prec=3, rounding=ROUND_CEILING)


class BlockResult(NamedTuple):
    """The masks of a block's linears, and new weights if they do not follow from the dense model's statistics."""

    block: int
    masks: tensors.Masks
    weights: dict[str, Tensor]  # by linear, in their stored dtypes
    diagnostics: Json  # solver diagnostics of each
    unreached: set[str]  # experts without tokens


class RepairedLinear(NamedTuple):
    """The linear before the removed blocks, and its new weight."""

    block: int
    name: str
    weight: Tensor
    diagnostics: Json


def mask(*, study: Study) -> None:
    """models/dense + stats/ (+ data/calibration) → masks/, weights/.

    weights/ has blocks only with a reconstruction, and `propagation: pruned` or the repair for blocks: new weights then
    do not follow from the statistics of the dense model.
    """
    plan = study.plan
    device = accelerator.float64_device(devices.own_device(study.params.runtime))  # refused before any file is read
    stats, digests = inputs.statistics(study)
    checkpoint, blocks = Checkpoint(study.model("dense")), artifact.block_count(study.stats, "calibrate")
    removal = choose_removal(study, checkpoint, blocks, device)
    sparsities = choose_sparsities(study, checkpoint, blocks)
    made_from = _describe(plan, stats, digests, sparsities, removal)
    units = {}
    if removal:
        units = {linear: removal.unit_sets[dimension.unit_set] for linear, dimension in removal.consumers.items()}
    job = MaskJob(plan, checkpoint, sparsities, units, study.fisher.absolute())
    with study.work(made_from) as work:
        work.adopt(made_from, study.masks, study.weights)
        masks, weights = work.output("masks"), work.output("weights")
        stores_weights = plan.mask_stores_weights
        finished = artifact.finished_blocks(masks)
        if stores_weights:
            finished = min(finished, artifact.finished_blocks(weights))
        repaired = None
        if removal and plan.repairs:
            repaired = repair_before_removed_blocks(study, checkpoint, removal, stats, work, finished)
        if plan.propagates:
            what = "mask, blocks calibrated and pruned"
            results = on_pruned_blocks(study, job, removal, stats, work, finished, device)
        else:
            what = "mask, blocks"
            results = from_statistics(study, job, removal, range(finished, blocks), device)
        unreached = {}
        for result in process.progress(results, total=blocks, what=what, at=lambda result: result.block):
            if repaired and result.block == repaired.block:
                result.weights[repaired.name] = repaired.weight
                result.diagnostics[repaired.name] = repaired.diagnostics
            if stores_weights:
                tensors.write_weights(weights, result.block, result.weights, result.diagnostics)
            tensors.write_masks(masks, result.block, result.masks)
            unreached[result.block] = result.unreached
        if plan.propagates or plan.method.needs != "weights":
            inputs.say_unreached("mask", unreached)  # of the blocks of this run
        artifact.finish(masks, made_from)
        artifact.finish(weights, made_from)
        work.commit(study.masks, study.weights)


def _describe(
    plan: Plan, stats: Json, digests: Json, sparsities: Sequence[BlockSparsity], removal: "Removal | None"
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
        model=stats["model"],
        stats=digest(stats),
        calibration={"text": stats["text"], **stats["params"]},
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


def removal_of(checkpoint: Checkpoint, plan: Plan) -> "Removal | None":
    """Return the units that a pattern removes; None if it sets weights to zero."""
    if plan.structure is None:
        return None
    # The import of transformers takes seconds.
    return resolve_name(plan.structure.find)(checkpoint, plan.structure, plan.sparsity)


def choose_removal(study: Study, checkpoint: Checkpoint, blocks: int, device: torch.device) -> "Removal | None":
    """Return the units that a pattern removes; None if it sets weights to zero.

    For blocks and experts, which ones; for neurons and heads only how many, because the masks of the linears that read
    them choose. UserError if a sparsity above 0 removes no unit.
    """
    plan = study.plan
    removal = removal_of(checkpoint, plan)
    if removal is None:
        return None
    if plan.sparsity and not removal.sparsity:
        raise UserError(_removes_no_unit(removal, plan))
    notice(f"mask: {removal.describe(plan.sparsity)}")
    if removal.consumers:  # the masks of these linears choose the units
        return removal
    from wanda_dvc.engine.finders import check_probe

    kept = choose_units(
        removal.unit_sets,
        checkpoint.weight,
        (tensors.read_stats(study.stats, block) for block in range(blocks)),
        method=plan.method,
        neighbours=plan.repairs,
        dtype=torch.float64 if removal.structure.name == "blocks" else torch.float32,
        device=device,
    )
    return check_probe(checkpoint, removal.with_kept(kept))


def _removes_no_unit(removal: "Removal", plan: Plan) -> str:
    """Return the message for a sparsity that rounds to 0: a sparsity that removes a unit, if there is one."""
    structure = removal.structure
    groups = max(units.groups for units in removal.unit_sets.values())
    sufficient: list[Fraction] = []
    for name, field in removal.config_fields.items():
        if field.unit_sets and name not in structure.scaled:
            multiple = math.lcm(groups, multiple_of(field.value, structure.multiple))
            sparsity = removing_sparsity(field.value, multiple)
            if sparsity:
                sufficient.append(sparsity)
    problem = f"sparsity: got {float(plan.sparsity):g}, which removes none of the {structure.about}"
    if not sufficient:
        return f"{problem}: the model needs all; choose another pattern"
    return f"{problem}; set sparsity={_rounded_up(min(sufficient))} or more"


def choose_sparsities(study: Study, checkpoint: Checkpoint, blocks: int) -> Sequence[BlockSparsity]:
    """Return the sparsity of each block, or of its linears; report it where counts of weights round it.

    UserError if a sparsity above 0 removes no weight.
    """
    plan = study.plan
    fisher = study.fisher if plan.mask_reads_gradient_squares else None
    stats = (tensors.read_stats(study.stats, block, fisher=fisher) for block in range(blocks))
    sparsities = allocate(
        checkpoint.weight,
        process.progress(stats, total=blocks, what="mask, blocks rated"),
        blocks,
        allocation=plan.allocation,
        sparsity=plan.sparsity,
        group=plan.group,
    )
    if plan.pattern != UNSTRUCTURED or plan.method.competition != "groups" or not plan.sparsity:
        return sparsities
    removed = total = largest = 0
    for block, sparsity in enumerate(sparsities):
        stats_of_block = tensors.read_stats(study.stats, block)
        competitions = competitions_of_block(checkpoint.weight, stats_of_block, plan.group)
        for linear, (groups, size) in competitions.items():
            removed += groups * count_removed(size, linear_sparsity(sparsity, linear))
            total += groups * size
            largest = max(largest, size)
    requested = f"{float(plan.sparsity):g}"
    if not removed:
        raise UserError(
            f"sparsity: got {requested}, which removes no weight: at most {largest} weights compete with one another; "
            f"set sparsity={_rounded_up(Fraction(1, largest))} or more"
        )
    if abs(Fraction(removed, total) - plan.sparsity) > ROUNDING_NOTICED:
        notice(f"mask: sparsity: rounded: {removed / total:.4g} instead of {requested}, by the sizes of the linears")
    return sparsities


def _rounded_up(sparsity: Fraction) -> str:
    return f"{HINT_CONTEXT.divide(sparsity.numerator, sparsity.denominator):f}"


# --- the blocks ---


def from_statistics(
    study: Study, job: MaskJob, removal: "Removal | None", blocks: Iterable[int], device: torch.device
) -> Iterator[BlockResult]:
    """Yield each block's result, from the statistics of the dense model.

    Scores are computed in this process: each weight is read once, and networks are slower than disks. Solver tasks may
    run on a cluster.
    """
    if not job.plan.solves_by_input:
        for block in blocks:
            stats = tensors.read_stats(study.stats, block)
            masks = score_block(job, block, stats, device)
            yield without_units(removal, BlockResult(block, masks, {}, {}, stats.unreached()))
        return
    stats_of = {block: tensors.read_stats(study.stats, block) for block in blocks}
    tasks = [task for block, stats in stats_of.items() for task in solver_tasks(block, stats)]
    solve_task = partial(solve_from_file, job, study.gram.absolute())
    cluster = inputs.cluster(study, [study.model("dense"), study.gram])
    outputs: Iterator[SolverOutput]
    if cluster is None:
        outputs = (solve_task(device, task) for task in tasks)
    else:
        outputs = cluster.map(solve_task, tasks, "solver")
    # Outputs come in the order of the tasks, one for each distinct input of a block.
    for block, stats in stats_of.items():
        yield without_units(removal, merged(block, stats, itertools.islice(outputs, len(stats.consumers))))


def on_pruned_blocks(
    study: Study, job: MaskJob, removal: "Removal | None", stats: Json, work: Work, finished: int, device: torch.device
) -> Iterator[BlockResult]:
    """Yield the result of each block after the finished ones, calibrated on the outputs of the pruned blocks before it.

    This is the paper's procedure. Text, windows and dtype are those of stats/.
    """
    plan = job.plan
    run, windows = _calibrated(study, stats, work)
    for step in run.forward(windows, finished=finished, with_dense=plan.corrects):
        record = step.record(gram=plan.solves_by_input, changes=True)
        if plan.solves_by_input:
            outputs = solve_recorded(job, run, step.index, record, device)
            result = merged(step.index, record.stats, outputs)
        else:
            masks = score_block(job, step.index, record.stats, device)
            result = BlockResult(step.index, masks, {}, {}, record.stats.unreached())
        del record  # before the next block's
        result = without_units(removal, result)
        yield result
        step.change(result.masks, result.weights)


def solve_recorded(
    job: MaskJob, run: "ModelRunner", block: int, record: "BlockRecord", device: torch.device
) -> Iterator[SolverOutput]:
    """Yield the masks and weights of the linears of each input, from Gram matrices that were recorded.

    In this process, matrices stay in memory, and each is removed from the record when it is used. A cluster reads them
    from a file, as exact: float32.
    """
    tasks = solver_tasks(block, record.stats)
    if run.cluster is None:
        for task in tasks:
            yield solve(job, task, record.grams.pop(task.name, None), record.crosses.pop(task.name, None), device)
        return
    folder = run.work / "recorded"
    folder.mkdir(exist_ok=True)
    tensors.write_grams(folder, block, record.stats, record.grams, record.crosses)
    record.grams.clear()  # the next matrices need their memory
    record.crosses.clear()
    yield from run.cluster.map(partial(solve_from_file, job, folder), tasks, f"block {block}, solver")
    artifact.block_file(folder, block).unlink(missing_ok=True)


def merged(block: int, stats: BlockStats, outputs: Iterable[SolverOutput]) -> BlockResult:
    """Return a block's result from the outputs of its solver tasks."""
    result = BlockResult(block, tensors.Masks(), {}, {}, stats.unreached())
    for output in outputs:
        result.masks.data |= output.masks
        result.weights.update(output.weights)
        result.diagnostics.update(output.diagnostics)
    return result


def without_units(removal: "Removal | None", result: BlockResult) -> BlockResult:
    """Return a result whose masks remove all weights of the removed units, given the masks of the units' consumers."""
    if removal is None:
        return result
    masks = tensors.pack_masks(removal.expand_masks(result.masks))
    weights = {linear: masked(weight, masks[linear]) for linear, weight in result.weights.items()}
    return result._replace(masks=masks, weights=weights)


# --- runs of the model ---


def _calibrated(study: Study, stats: Json, work: Work) -> "tuple[ModelRunner, Tensor]":
    text = read_provenance(study.data("calibration"), "download calibration")
    check_source("stats", stats["text"], text, "calibrate")
    windows = inputs.calibration_windows(study)
    return inputs.runner(study, "dense", work), windows


def repair_before_removed_blocks(
    study: Study, checkpoint: Checkpoint, removal: "Removal", stats: Json, work: Work, finished: int
) -> RepairedLinear | None:
    """Return the new weight of the last linear before the removed blocks; None if no block is removed.

    None also if the block before them is finished: its new weight is stored.
    """
    from wanda_dvc.engine.repair import repair  # imports transformers, which takes seconds

    (kept,) = removal.kept_masks.values()
    if kept.all():
        return None
    removed = (~kept).nonzero()[:, 0].tolist()
    block = removed[0] - 1  # the block before the removed ones
    end = removed[-1] + 1  # the block after them
    if block < finished:
        return None
    run, windows = _calibrated(study, stats, work)
    linears = run.decoder.linears(block)
    # The statistics are in the order in which the block calls its linears. An expert's linear adds to some tokens only,
    # so it cannot take over what the removed blocks add to all of them.
    candidates = [
        name for name in tensors.read_stats(study.stats, block).by_linear if linears[name].stored.expert is None
    ]
    last = candidates[-1]
    # The repair reads the activations before `block` to `end`. Of n stored blocks n − 1 are finished, one is written.
    steps = itertools.takewhile(lambda step: step.index < end, run.forward(windows, stored=end - block + 2))
    what = "mask, blocks run for the repair"
    for step in process.progress(steps, total=end, what=what, at=lambda step: step.index):
        step.run()
    weight, diagnostics = repair(run, last, checkpoint.weight(last), block=block, end=end)
    return RepairedLinear(block, last, weight, diagnostics)
