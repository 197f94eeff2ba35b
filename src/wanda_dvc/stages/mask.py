"""Choose the weights that stay: scores from weights and statistics, `keep` masks from scores."""

import os
from dataclasses import replace

from torch import Tensor

from wanda_dvc.catalog import methods
from wanda_dvc.engine.checkpoint import Checkpoint
from wanda_dvc.engine.costs import HOST, Cost, Setting
from wanda_dvc.engine.memory import keep_freed_memory
from wanda_dvc.engine.sizes import SELECTION, Need, choosing, propagating, sizes
from wanda_dvc.errors import UserError
from wanda_dvc.params import Params
from wanda_dvc.pruning.choose import Target, choose_block
from wanda_dvc.pruning.statistics import BlockStats
from wanda_dvc.stages import STAGES
from wanda_dvc.stages.inputs import (
    calibration_cost,
    calibration_need,
    calibration_windows,
    check_fits,
    check_ready,
    largest,
    open_decoder,
    statistics,
)
from wanda_dvc.stages.running import progress, say_unreached
from wanda_dvc.study.files import Json
from wanda_dvc.study.project import Project, Work
from wanda_dvc.study.provenance import describe, digest, read_provenance
from wanda_dvc.study.tensors import finished_blocks, read_stats, seal, write_masks


def mask(*, project: Project) -> None:
    """models/dense + stats/ (+ data/calibration for `propagation: pruned`) → masks/."""
    keep_freed_memory()
    params, stats = project.params, statistics(project)
    check_fits(project, stats.features)
    made_from = describe(
        "masks",
        version=STAGES["mask"].version,
        libraries=("torch", "numpy"),
        model=stats.provenance["model"],
        stats=digest(stats.provenance),
        calibration={"text": stats.provenance["text"], **stats.provenance["params"]},
        params={
            "method": params.method,
            "sparsity": params.sparsity,
            "pattern": params.pattern,
            "group": params.group,
            "propagation": params.propagation,
        },
    )
    checkpoint = Checkpoint(project.model("dense"))
    with project.work(made_from) as work:
        if propagates(params):
            _propagate(project, checkpoint, stats.provenance, work)
        else:
            unreached = {}
            for block in progress(range(stats.blocks), total=stats.blocks, what="mask, blocks"):
                measured = read_stats(project.stats, block)
                unreached[block] = measured.unreached()
                write_masks(work.out, block, keeps(params, checkpoint, measured))
            if methods()[params.method].needs_inputs():
                say_unreached("mask", unreached)
        seal(work.out, made_from)
        work.publish(project.masks)


def propagates(params: Params) -> bool:
    """Whether masks are chosen on the outputs of pruned blocks, and not from stats/."""
    return params.propagation == "pruned" and methods()[params.method].needs_inputs()


def keeps(params: Params, checkpoint: Checkpoint, block: BlockStats) -> dict[str, Tensor]:
    """Return the masks of one block's linears, every linear with the same share."""
    target = Target(params.share, params.pattern, params.group)
    targets = {name: target for names in block.readers.values() for name in names}
    return choose_block(checkpoint.weight, block, method=methods()[params.method], targets=targets)


def _propagate(project: Project, checkpoint: Checkpoint, stats: Json, work: Work) -> None:
    """Follow the paper's procedure: each block is calibrated on the outputs of the blocks pruned before it."""
    # Only here is a model run: without the engine and transformers a further sparsity starts seconds earlier.
    from wanda_dvc.engine.recorder import InputRecorder
    from wanda_dvc.engine.walk import walk

    # Text, windows and dtype are those of stats/: the masks depend on it, and on no setting of calibration.
    text = read_provenance(project.data("calibration"), "download calibration")
    if text["sha256"] != stats["text"]["sha256"]:
        raise UserError(
            f"stats/: measured on {stats['text']['source']}, expected {text['source']}, the text in data/calibration; "
            "run `dvc repro` or `wanda-dvc calibrate`"
        )
    check_ready(project, "dense")
    decoder = open_decoder(project, "dense", dtype=stats["params"]["dtype"])
    windows = calibration_windows(project, stats["params"])
    steps = walk(decoder, windows, work.path, kept=finished_blocks(work.out))
    unreached = {}
    for step in progress(steps, total=len(decoder.blocks), what="mask, blocks calibrated and pruned"):
        recorder = InputRecorder()
        step.advance(recorder)
        measured = recorder.result()
        unreached[step.index] = measured.unreached()
        chosen = keeps(project.params, checkpoint, measured)
        write_masks(work.out, step.index, chosen)
        step.prune(chosen)
        step.advance()
    say_unreached("mask", unreached)  # of the blocks that this run has calibrated


def _selects_by_row(params: Params) -> bool:
    return methods()[params.method].selects_by_row(params.pattern, params.group)


def need(project: Project, _: str | None = None) -> Need:
    """Masks and scores; with `propagation: pruned` those of `calibrate` too."""
    folder, params = project.model("dense"), project.params
    if not (folder / "config.json").is_file():
        return Need()
    threads, by_row = params.runtime.threads or os.cpu_count() or 1, _selects_by_row(params)
    if not propagates(params):
        block, linear = largest(project)
        return Need(choosing(block=block, linear=linear, threads=threads, by_row=by_row), disk=0)
    walk, model = calibration_need(project), sizes(folder)
    chosen = choosing(block=model.block, linear=model.linear, threads=threads, by_row=by_row)
    if walk.memory is None:
        return walk
    return replace(walk, memory=propagating(walk.memory, chosen, model=model, dtype=params.dtype))


def cost(params: Params, on: Setting) -> Cost:
    """One pass over weights and scores; with `propagation: pruned` each block is run twice more."""
    linears, model = on.work.linears, on.model
    by_row = _selects_by_row(params)
    memory = choosing(block=model.block, linear=model.linear, threads=on.threads, by_row=by_row)
    masks = linears / 8
    chosen = Cost(0, model.stored, 0, masks, memory, linears * (on.stored_width + SELECTION) / HOST)
    if not propagates(params):
        return chosen
    once = calibration_cost(params, on)
    twice = on.walk(2 * params.calibration.samples, params.calibration.length, once.memory)
    return replace(
        twice,
        disk=masks + once.disk,
        memory=propagating(once.memory, memory, model=model, dtype=on.dtype),
        seconds=twice.seconds + chosen.seconds,
    )
