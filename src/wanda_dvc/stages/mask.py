"""Compute the `keep` masks: scores from weights and statistics, masks from scores."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from wanda_dvc.catalog import Structure, function_of
from wanda_dvc.engine import accelerator
from wanda_dvc.engine.checkpoint import Checkpoint
from wanda_dvc.engine.memory import keep_freed_memory
from wanda_dvc.errors import notice
from wanda_dvc.plan import CORRECTION, TRAINING, Plan
from wanda_dvc.pruning.allocation import allocate
from wanda_dvc.pruning.choose import (
    Share,
    aim_block,
    choose_block,
    keeps_all,
    masked,
    prepared_linears,
    reconstruct,
)
from wanda_dvc.pruning.gram import Gram
from wanda_dvc.pruning.statistics import BlockStats
from wanda_dvc.pruning.units import Units
from wanda_dvc.pruning.whole import choose_units
from wanda_dvc.stages import STAGES
from wanda_dvc.stages.inputs import (
    Statistics,
    calibration_windows,
    check_fits,
    check_ready,
    check_text,
    executor,
    runner,
    statistics,
    tier_provenance,
)
from wanda_dvc.stages.running import progress, say_unreached, solving_device
from wanda_dvc.study.files import Json
from wanda_dvc.study.project import Project, Work
from wanda_dvc.study.provenance import describe, digest
from wanda_dvc.study.tensors import (
    Grams,
    Masks,
    finished_blocks,
    pack_grams,
    pack_masks,
    read_fisher,
    read_grams,
    read_stats,
    seal,
    write_masks,
    write_weights,
)

if TYPE_CHECKING:
    from wanda_dvc.engine.removal import Removal


def mask(*, project: Project) -> None:
    """models/dense + stats/ (+ data/calibration) → masks/, weights/.

    weights/ has blocks only with `propagation: pruned` and a reconstruction: new weights change the next block's
    calibration inputs, and do not follow from the statistics of the dense model.
    """
    keep_freed_memory()
    params, plan = project.params, project.params.plan
    solving_device(params.runtime)  # refused before any file is read
    stats = statistics(project)
    check_fits(project, stats.features)
    if plan.left_out:
        notice(
            f"mask: pattern {plan.pattern} has choices of its own: {', '.join(plan.left_out)} ignored (recipe "
            f"{params.recipe})"
        )
    checkpoint = Checkpoint(project.model("dense"))
    removal = removal_of(checkpoint, plan.structure, plan.share)
    if removal:
        notice(f"mask: {removal.about(plan.share)}")
        every = (read_stats(project.stats, block) for block in range(stats.blocks))
        removal = with_chosen_units(removal, checkpoint, every, plan, device=solving_device(params.runtime))
    shares = _shares(project, stats, checkpoint)
    made_from = describe(
        "mask",
        version=STAGES["mask"].version,
        libraries=plan.libraries,
        model=stats.provenance["model"],
        stats=digest(stats.provenance),
        calibration={"text": stats.provenance["text"], **stats.provenance["params"]},
        params=plan.described,
        **({"gram": digest(tier_provenance(project, project.gram))} if plan.masks_read_gram else {}),
        **({"gradients": digest(tier_provenance(project, project.gradients))} if plan.masks_read_tier else {}),
        **({"config": removal.changes} if removal else {}),
        **({"sparsities": list(map(_written, shares))} if plan.allocation.name != "uniform" else {}),
    )
    with project.work(made_from) as work:
        masks, weights = work.part("masks"), work.part("weights")
        if plan.propagates:
            _propagate(project, checkpoint, stats, shares, work, removal)
        else:
            unreached = {}
            for block, measured, chosen in _chosen(project, checkpoint, stats, shares, finished_blocks(masks), removal):
                unreached[block] = measured.unreached()
                write_masks(masks, block, chosen)
                del chosen  # before the next block's masks arrive
            if plan.method.needs_inputs():
                say_unreached("mask", unreached)
        seal(masks, made_from)
        seal(weights, made_from)
        work.publish(project.masks, project.weights)


def removal_of(source: Checkpoint, structure: Structure | None, share: Fraction) -> "Removal | None":
    """Return the units that a pattern removes; None if it sets weights to zero."""
    if structure is None:
        return None
    found: Removal = function_of(structure.find)(source, structure, share)  # imports transformers, which takes seconds
    return found


def with_chosen_units(
    removal: "Removal",
    source: Checkpoint,
    blocks: Iterable[BlockStats],
    plan: Plan,
    *,
    device: torch.device | None = None,
) -> "Removal":
    """Return a removal of complete linears with the units that stay, and any other removal as it is."""
    if not removal.whole:
        return removal
    from wanda_dvc.engine.finders import confirmed

    stays = choose_units(removal.whole, source.weight, blocks, method=plan.method, device=device)
    return confirmed(source, removal.with_stays(stays))


def _shares(project: Project, stats: Statistics, checkpoint: Checkpoint) -> Sequence[Share]:
    """Return the share of weights to prune, of each block or of each linear.

    Ratings use the dense model's statistics.
    """
    plan = project.params.plan
    allocation = plan.allocation

    def blocks() -> Iterator[BlockStats]:
        for block in progress(range(stats.blocks), total=stats.blocks, what="mask, blocks rated"):
            yield informed(project, plan, block)

    return allocate(
        checkpoint.weight,
        blocks(),
        stats.blocks,
        allocation=allocation,
        share=plan.share,
        group=plan.group,
        strength=plan.strength,
    )


def read_share(written: float | Mapping[str, float]) -> Share:
    """Return a block's share, or its linears' shares, from provenance."""
    if isinstance(written, Mapping):
        return {name: Fraction(x) for name, x in written.items()}
    return Fraction(str(written))


def _written(share: Share) -> float | dict[str, float]:
    """Return a block's share, or its linears' shares, in the form of the provenance."""
    return {name: float(x) for name, x in share.items()} if isinstance(share, Mapping) else float(share)


Weights = Callable[[str], Tensor]


def informed(project: Project, plan: Plan, block: int, measured: BlockStats | None = None) -> BlockStats:
    """Return the statistics of one block, by default of stats/, with the gradients tier if masks depend on it."""
    measured = measured or read_stats(project.stats, block)
    return measured._replace(fisher=read_fisher(project.gradients, block)) if plan.masks_read_sums else measured


def keeps(  # noqa: PLR0913 - the block, and how its masks are chosen
    plan: Plan,
    weights: Weights,
    block: BlockStats,
    share: Share,
    removal: "Removal | None" = None,
    *,
    grams: Mapping[str, Gram] | None = None,
    device: torch.device | None = None,
) -> dict[str, Tensor]:
    """Return the masks of one block's linears. `weights` reads a stored weight, and solvers read `grams`."""
    units = removal.units if removal else None
    chosen = choose_block(
        weights,
        block,
        method=plan.method,
        share=share,
        pattern=plan.pattern,
        group=plan.group,
        units=units,
        grams=grams,
        device=device,
    )
    return removal.spread(chosen) if removal else chosen


def _chosen(  # noqa: PLR0913, PLR0917 - the inputs of solvers
    project: Project,
    checkpoint: Checkpoint,
    stats: Statistics,
    shares: Sequence[Share],
    finished: int,
    removal: "Removal | None",
) -> Iterator[tuple[int, BlockStats, Mapping[str, Tensor]]]:
    """Yield blocks with their statistics and masks.

    Scores are computed in this process, for all blocks: each weight is read once, and networks are slower than disks.
    For solvers each distinct input is a job, and blocks `finished` by an earlier run are left out.
    """
    plan, blocks = project.params.plan, range(stats.blocks)
    if plan.method.competition != "solver":
        device = solving_device(project.params.runtime)
        for block in progress(blocks, total=stats.blocks, what="mask, blocks"):
            measured = informed(project, plan, block)
            yield block, measured, keeps(plan, checkpoint.weight, measured, shares[block], removal, device=device)
        return

    def parts() -> Iterator[Part]:
        for block in blocks[finished:]:
            measured, grams = informed(project, plan, block), read_grams(project.gram, block)
            yield from _parts(
                plan, checkpoint, block, measured, grams, shares[block], stored=project.gram, removal=removal
            )

    _grams.cache_clear()  # of an earlier run in this process
    with executor(project, [checkpoint.folder, project.gram]) as run:
        made = run.map(solve, parts(), "solver")
        for block in progress(blocks, total=stats.blocks, what="mask, blocks"):
            if block >= finished:
                measured = read_stats(project.stats, block)
                yield block, measured, _together(itertools.islice(made, len(measured.readers)), removal).keeps


# --- one distinct input ---


@dataclass(frozen=True)
class Part:
    """One distinct input of a block, and all data for the masks and weights of its linears."""

    plan: Plan
    share: Share
    stats: BlockStats  # of this input alone
    weights: Checkpoint
    grams: Grams | tuple[Path, int]  # of this input; or stats/gram and the block
    crosses: Mapping[str, Tensor]  # X_denseᵀX, likewise, if weights are corrected
    gradients: Mapping[str, Gram]  # of what its linears put out, by linear, where the reconstruction is given them
    units: Mapping[str, Units]  # that its linears read, where the pattern removes some


class Made(NamedTuple):
    """Masks, and the weights on them, by linear."""

    keeps: Masks
    weights: dict[str, Tensor]  # in their stored dtypes
    diagnostics: Json  # solver diagnostics of each


def solve(device: torch.device, part: Part) -> Made:
    """Return masks and weights of the linears that read one distinct input of a block."""
    plan, block, device = part.plan, part.stats, accelerator.solving_device(device)
    stored = {
        name: part.weights.weight(name).to(device) for names in block.readers.values() for name in names
    }  # copied once
    weights = stored.__getitem__
    grams = part.grams if isinstance(part.grams, Grams) else _grams(*part.grams).of(*block.readers)
    grams = grams.on(device)
    if plan.corrects:
        crosses = {name: cross.to(device) for name, cross in part.crosses.items()}
        aimed = aim_block(weights, block, grams=grams, crosses=crosses, strength=CORRECTION)
        weights = aimed.__getitem__
    chosen = choose_block(
        weights,
        block,
        method=plan.method,
        share=part.share,
        pattern=plan.pattern,
        group=plan.group,
        units=part.units,
        grams=grams,
        device=device,
    )
    solved = {}
    if plan.propagates and plan.solves:
        solved = {
            name: reconstruct(
                weights(name),
                chosen[name],
                prepared,
                reconstruction=plan.solver,
                gradients=part.gradients.get(name),
                transposed=name in block.transposed,
            )
            for name, prepared in prepared_linears(block.readers, grams)
            if prepared is not None and (plan.corrects or not keeps_all(name, plan.pattern, part.units))
        }
    changed = {name: one.weight.to("cpu", stored[name].dtype) for name, one in solved.items()}
    return Made(pack_masks(chosen), changed, {name: one.diagnostics for name, one in solved.items()})


_grams = lru_cache(maxsize=1)(read_grams)


def _parts(  # noqa: PLR0913, PLR0917 - the inputs of solvers
    plan: Plan,
    checkpoint: Checkpoint,
    block: int,
    measured: BlockStats,
    grams: Mapping[str, Gram],
    share: Share,
    *,
    crosses: Mapping[str, Tensor] | None = None,
    gradients: Grams | None = None,
    stored: Path | None = None,
    removal: "Removal | None" = None,
) -> Iterator[Part]:
    """Yield the distinct inputs of a block. `stored` is the folder of its Gram matrices, if they were read from one."""
    for source, names in measured.readers.items():
        stats = measured.of(source)
        if isinstance(grams, Grams):
            own = grams.of(source)
        else:
            own = pack_grams(stats, {source: grams[source]} if source in grams else {}, None)
        cross = {source: crosses[source].float()} if crosses and source in crosses else {}
        back = gradients.of(*names) if gradients else {}
        units = {name: removal.units[name] for name in names if name in removal.units} if removal else {}
        yield Part(plan, share, stats, checkpoint, (stored, block) if stored else own, cross, back, units)


def _together(parts: Iterable[Made], removal: "Removal | None") -> Made:
    """Merge the results of all distinct inputs of a block. Of removed units, all weights go."""
    keeps, weights, diagnostics = Masks({}, {}), dict[str, Tensor](), Json()
    for part in parts:
        keeps |= part.keeps
        weights |= part.weights
        diagnostics |= part.diagnostics
    if removal:
        keeps = pack_masks(removal.spread(keeps))
        weights = {name: masked(weight, keeps[name]) for name, weight in weights.items()}
    return Made(keeps, weights, diagnostics)


# --- blocks calibrated on the outputs of pruned ones ---


def _propagate(  # noqa: PLR0913, PLR0917 - the inputs of masks
    project: Project,
    checkpoint: Checkpoint,
    stats: Statistics,
    shares: Sequence[Share],
    work: Work,
    removal: "Removal | None",
) -> None:
    """Follow the paper's procedure: each block is calibrated on the outputs of the blocks pruned before it."""
    # Text, windows and dtype come from stats/: the masks depend on stats/, and on no setting of calibration.
    measured_with = stats.provenance["params"]
    check_text(project, stats.provenance["text"], "stats/: measured on", "`dvc repro` or `wanda-dvc calibrate`")
    check_ready(project, "dense")
    plan, windows = project.params.plan, calibration_windows(project, measured_with)
    masks, weights, device = work.part("masks"), work.part("weights"), solving_device(project.params.runtime)
    kept = min(map(finished_blocks, [masks, weights] if plan.solves else [masks]))

    unreached = {}
    with runner(project, "dense", work, dtype=measured_with["dtype"]) as run:
        # A training needs the dense block's outputs too, a correction its inputs.
        steps = run.walk(windows, kept=kept, with_dense=plan.runs_dense)
        blocks = len(run.decoder.blocks)
        for step in progress(steps, total=blocks, what="mask, blocks calibrated and pruned"):
            share = shares[step.index]
            recorded = step.record(gram=plan.records_grams, crosses=plan.corrects)
            measured = informed(project, plan, step.index, recorded.stats)
            unreached[step.index] = measured.unreached()
            if plan.records_grams:
                back = read_grams(project.gradients, step.index) if plan.masks_read_gradients else None
                parts = _parts(
                    plan,
                    checkpoint,
                    step.index,
                    measured,
                    recorded.grams,
                    share,
                    crosses=recorded.crosses,
                    gradients=back,
                    removal=removal,
                )
                keep, changed, diagnostics = _together(run.map(solve, parts, f"block {step.index}, solver"), removal)
            else:
                chosen = keeps(plan, checkpoint.weight, measured, share, removal, device=device)
                keep, changed, diagnostics = Made(pack_masks(chosen), {}, {})  # Ray keeps the masks over all blocks
            if plan.trains:
                trained = step.train(keep, changed, **TRAINING)
                changed = {name: weight.to(checkpoint.weight(name).dtype) for name, weight in trained.items()}
            if plan.solves:
                write_weights(weights, step.index, changed, diagnostics)
            write_masks(masks, step.index, keep)
            step.change(keep, changed)
    say_unreached("mask", unreached)  # of the blocks calibrated by this run
