"""Compute the `keep` masks, and new weights where they change the inputs of later blocks."""

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial, reduce
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from wanda_dvc.engine import accelerator
from wanda_dvc.engine.checkpoint import Checkpoint
from wanda_dvc.errors import notice
from wanda_dvc.plan import CORRECTION, Plan
from wanda_dvc.pruning import masks as choose_masks
from wanda_dvc.pruning import reconstruction
from wanda_dvc.pruning.allocation import allocate
from wanda_dvc.pruning.gram import Gram
from wanda_dvc.pruning.statistics import BlockStats
from wanda_dvc.pruning.units import Units
from wanda_dvc.stages import STAGES, inputs, process
from wanda_dvc.stages import device as devices
from wanda_dvc.study import artifact, tensors
from wanda_dvc.study.artifact import Work, check_source, describe, digest, read_provenance
from wanda_dvc.study.files import Json
from wanda_dvc.study.folder import Study

if TYPE_CHECKING:
    from wanda_dvc.engine.cluster import Cluster
    from wanda_dvc.engine.forward import BlockStep, ModelRunner
    from wanda_dvc.engine.removal import Removal


def mask(*, study: Study) -> None:
    """models/dense + stats/ (+ data/calibration) → masks/, weights/.

    weights/ has blocks only with a reconstruction, and `propagation: pruned` or the repair for blocks: new weights then
    do not follow from the statistics of the dense model.
    """
    plan = study.plan
    device = accelerator.solving_device(devices.own_device(study.params.runtime))  # refused before any file is read
    stats, tiers = inputs.statistics(study)
    checkpoint, blocks = Checkpoint(study.model("dense")), range(artifact.block_count(study.stats, "calibrate"))
    read, removal = checkpoint.weight, removal_of(checkpoint, plan)
    if removal:
        notice(f"mask: {removal.about(plan.sparsity)}")
        if not removal.consumers:  # units are complete linears
            from wanda_dvc.engine.finders import confirmed

            every = (tensors.read_stats(study.stats, block) for block in blocks)
            dtype = torch.float64 if removal.structure.name == "blocks" else torch.float32
            stays = choose_masks.choose_units(
                removal.unit_sets, read, every, method=plan.method, together=plan.repairs, dtype=dtype, device=device
            )
            removal = confirmed(checkpoint, removal.with_kept(stays))
    fisher_folder = study.fisher.absolute()
    sums = fisher_folder if plan.masks_read_fisher else None
    every = (tensors.read_stats(study.stats, block, fisher=sums) for block in blocks)
    rated = process.progress(every, total=len(blocks), what="mask, blocks rated")
    sparsities = allocate(
        read, rated, len(blocks), allocation=plan.allocation, sparsity=plan.sparsity, group=plan.group
    )
    made_from = _describe(plan, stats, tiers, sparsities, removal)
    units = {}
    if removal:
        units = {linear: removal.unit_sets[dimension.unit_set] for linear, dimension in removal.consumers.items()}
    solving = partial(solve, plan, checkpoint, units, fisher_folder)
    with study.work(made_from) as work:
        work.adopt(made_from, study.masks, study.weights)
        masks, weights = work.output("masks"), work.output("weights")
        unreached: dict[int, set[str]] = {}
        repairs = repaired(study, checkpoint, removal, stats, work) if removal and plan.repairs else {}
        stored = [masks, weights] if plan.weights_come_from == "weights" else [masks]
        finished = min(map(artifact.finished_blocks, stored))
        solved: Iterator[tuple[BlockResult, BlockStep | None]] = from_statistics(
            study, solving, sparsities, blocks[finished:]
        )
        if plan.propagates:
            solved = walked(study, solving, sparsities, stats, work, finished)
        what = "mask, blocks" + " calibrated and pruned" * plan.propagates
        for made, step in process.progress(solved, total=len(blocks), what=what, at=lambda one: one[0].block):
            keep, (changed, diagnostics) = made.keeps, repairs.get(made.block, (made.weights, made.diagnostics))
            if removal:  # of removed units, all weights go
                keep = tensors.pack_masks(removal.expand_masks(keep))
                changed = {name: reconstruction.masked(weight, keep[name]) for name, weight in changed.items()}
            if weights in stored:
                tensors.write_weights(weights, made.block, changed, diagnostics)
            tensors.write_masks(masks, made.block, keep)
            if step:
                step.change(keep, changed)
            unreached[made.block] = made.unreached
        if plan.propagates or plan.method.needs != "weights":
            inputs.say_unreached("mask", unreached)  # of the blocks of this run
        artifact.finish(masks, made_from)
        artifact.finish(weights, made_from)
        work.commit(study.masks, study.weights)


def _describe(
    plan: Plan, stats: Json, tiers: Json, sparsities: Sequence[choose_masks.Sparsity], removal: "Removal | None"
) -> Json:
    """Return the provenance of masks and weights."""
    runs = ("transformers",) if plan.propagates or plan.structure else ()
    described = describe(
        "mask",
        version=STAGES["mask"].version,
        libraries=("torch", "numpy", *runs, *filter(None, [plan.method.package])),
        model=stats["model"],
        stats=digest(stats),
        calibration={"text": stats["text"], **stats["params"]},
        params=plan.described,
        **tiers,
    )
    if removal:
        described["config"] = removal.config_changes
    if plan.allocation.name != "uniform":
        described["sparsities"] = [
            {name: float(x) for name, x in sparsity.items()} if isinstance(sparsity, Mapping) else float(sparsity)
            for sparsity in sparsities
        ]
    return described


def removal_of(source: Checkpoint, plan: Plan) -> "Removal | None":
    """Return the units that a pattern removes; None if it sets weights to zero."""
    if plan.structure is None:
        return None
    # The import of transformers takes seconds.
    return resolve_name(plan.structure.find)(source, plan.structure, plan.sparsity)


# --- the unit of work ---


class MaskTask(NamedTuple):
    """The linears that read one distinct input of a block, or, where scores choose masks, all of a block."""

    block: int
    stats: BlockStats  # of these inputs
    sparsity: choose_masks.Sparsity
    grams: Path  # the folder of the Gram matrices, for solvers


class BlockResult(NamedTuple):
    """Masks of some linears of a block, and their new weights if they are solved for here."""

    block: int
    keeps: tensors.Masks
    weights: dict[str, Tensor]  # by linear, in their stored dtypes
    diagnostics: Json  # solver diagnostics of each
    unreached: set[str]  # experts without tokens


Solving = Callable[[torch.device, MaskTask], BlockResult]


def solve(
    plan: Plan,
    source: Checkpoint,
    units: Mapping[str, Units],
    fisher_folder: Path,
    device: torch.device,
    part: MaskTask,
) -> BlockResult:
    """Return masks, and new weights if later blocks depend on them, of a part's linears.

    `units` are those that go, by the linear that reads them; `gradients` is the folder of that tier.
    """
    block, device = part.stats, accelerator.solving_device(device)
    if plan.masks_read_fisher:
        block = block._replace(fisher=tensors.read_fisher(fisher_folder, part.block))
    weights: reconstruction.ReadWeight = source.weight
    grams: tensors.Grams | None = None
    if plan.solves_by_input:
        weights = {name: weights(name).to(device) for name in block.by_linear}.__getitem__  # copied once
        grams = tensors.read_grams(part.grams, part.block, device, of=block.consumers)
        if plan.corrects:
            aimed = reconstruction.target_block(weights, block, grams=grams, crosses=grams.crosses, strength=CORRECTION)
            weights = aimed.__getitem__
    chosen = choose_masks.choose_block(
        weights,
        block,
        method=plan.method,
        sparsity=part.sparsity,
        pattern=plan.pattern,
        group=plan.group,
        units=units,
        grams=grams,
        device=device,
    )
    changed, diagnostics = dict[str, Tensor](), Json()
    if grams is not None and plan.weights_come_from == "weights":
        back: Mapping[str, Gram] = {}
        if plan.solver_reads_fisher:
            back = tensors.read_grams(fisher_folder, part.block, of=block.by_linear)
        for name, prepared in reconstruction.factors_of_linears(block.consumers, grams):
            if prepared is not None and (plan.corrects or not choose_masks.keeps_all(name, plan.pattern, units)):
                weight, keep, across = weights(name), chosen[name], name in block.transposed
                solved = reconstruction.reconstruct(
                    weight, keep, prepared, reconstruction=plan.solver, gradients=back.get(name), transposed=across
                )
                changed[name] = reconstruction.finite(name, solved.weight.to("cpu", source.weight(name).dtype))
                diagnostics[name] = solved.diagnostics
    return BlockResult(part.block, tensors.pack_masks(chosen), changed, diagnostics, block.unreached())


def parts_of(
    plan: Plan, block: int, measured: BlockStats, sparsity: choose_masks.Sparsity, grams: Path
) -> list[MaskTask]:
    """Return the parts of a block; `grams` is the folder of its Gram matrices."""
    locked = [measured.of(source) for source in measured.consumers] if plan.solves_by_input else [measured]
    return [MaskTask(block, own, sparsity, grams.absolute()) for own in locked]


def together(parts: Iterable[BlockResult]) -> BlockResult:
    """Merge the results of all parts of a block."""
    (block, *_), *columns = zip(*parts, strict=True)
    return BlockResult(block, *(reduce(operator.or_, column) for column in columns))


def run_tasks(
    solving: Solving, tasks: Iterable[MaskTask], what: str, *, cluster: "Cluster | None", device: torch.device
) -> Iterator[BlockResult]:
    """Return the result of each task, in order: from a cluster, or computed here on a device."""
    if cluster is not None:
        return cluster.map(solving, tasks, what)
    return (solving(device, task) for task in tasks)


# --- the blocks ---


def from_statistics(
    study: Study, solving: Solving, sparsities: Sequence[choose_masks.Sparsity], blocks: Iterable[int]
) -> Iterator[tuple[BlockResult, None]]:
    """Yield each block, from the statistics of the dense model.

    Scores are computed in this process: each weight is read once, and networks are slower than disks.
    """
    plan = study.plan
    every = [parts_of(plan, n, tensors.read_stats(study.stats, n), sparsities[n], study.gram) for n in blocks]
    cluster = inputs.cluster(study, [study.model("dense"), study.gram]) if plan.solves_by_input else None
    device = devices.own_device(study.params.runtime)
    made = run_tasks(solving, itertools.chain.from_iterable(every), "solver", cluster=cluster, device=device)
    for own in every:
        yield together(itertools.islice(made, len(own))), None


def walked(
    study: Study, solving: Solving, sparsities: Sequence[choose_masks.Sparsity], stats: Json, work: Work, finished: int
) -> Iterator[tuple[BlockResult, "BlockStep"]]:
    """Yield each block after the finished ones, calibrated on the outputs of the pruned blocks before it.

    The caller changes the block at its step: the paper's procedure. Text, windows and dtype are those of stats/.
    """
    plan = study.plan
    run, windows = _calibrated(study, stats, work)
    folder = work.path / "recorded"
    folder.mkdir(exist_ok=True)
    for step in run.forward(windows, finished=finished, with_dense=plan.corrects):
        recorded = step.record(gram=plan.solves_by_input, changes=True)
        if plan.solves_by_input:
            tensors.write_grams(folder, step.index, recorded.stats, recorded.grams, recorded.crosses)
        own = parts_of(plan, step.index, recorded.stats, sparsities[step.index], folder)
        del recorded  # the next matrices need its memory
        what = f"block {step.index}, solver"
        made = together(run_tasks(solving, own, what, cluster=run.cluster, device=run.decoder.device))
        artifact.block_file(folder, step.index).unlink(missing_ok=True)
        yield made, step


def _calibrated(study: Study, stats: Json, work: Work) -> "tuple[ModelRunner, Tensor]":
    """Return a runner of the dense model and the windows, as for stats/. UserError if the text is another."""
    text = read_provenance(study.data("calibration"), "download calibration")
    check_source("stats", stats["text"], text, "calibrate")
    windows = inputs.calibration_windows(study)
    return inputs.runner(study, "dense", work), windows


def repaired(
    study: Study, source: Checkpoint, removal: "Removal", stats: Json, work: Work
) -> dict[int, tuple[dict[str, Tensor], Json]]:
    """Return the new weight of the last linear before blocks that go, and diagnostics, by its block."""
    from wanda_dvc.engine.repair import repair  # imports transformers, which takes seconds

    (stay,) = removal.kept.values()
    if stay.all():
        return {}
    gone = (~stay).nonzero()[:, 0].tolist()
    block = gone[0] - 1
    run, windows = _calibrated(study, stats, work)
    linears, measured = run.decoder.linears(block), tensors.read_stats(study.stats, block)
    # In the order of their calls. Of an expert's outputs only some tokens have a part.
    *_, last = (name for name in measured.by_linear if linears[name].stored.expert is None)
    end = gone[-1] + 1
    walk = itertools.takewhile(lambda step: step.index < end, run.forward(windows, stored=end - block + 2))
    what = "mask, blocks run for the repair"
    for step in process.progress(walk, total=end, what=what, at=lambda step: step.index):
        step.run()
    weight, diagnostics = repair(run, last, source.weight(last), block=block, end=end)
    return {block: ({last: weight}, {last: diagnostics})}
