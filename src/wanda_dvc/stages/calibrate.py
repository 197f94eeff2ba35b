"""Measure the dense model's activations once for each distinct input: the norm tier, and if asked the Gram tier.

And if asked the Fisher tier of each linear's outputs.
"""

from dataclasses import replace

from wanda_dvc.engine.costs import Cost, Setting
from wanda_dvc.engine.fisher import squared_gradients
from wanda_dvc.engine.sizes import Need, Sizes, differentiating, either, sizes
from wanda_dvc.params import Params
from wanda_dvc.pruning.statistics import summary
from wanda_dvc.stages import STAGES
from wanda_dvc.stages.inputs import (
    calibrated_with,
    calibration_cost,
    calibration_need,
    calibration_windows,
    check_fits,
    check_ready,
    gram_bytes,
    model_provenance,
    open_decoder,
    runner,
    waiting_bytes,
)
from wanda_dvc.stages.running import progress, say_unreached
from wanda_dvc.study.files import write_csv
from wanda_dvc.study.project import Project
from wanda_dvc.study.provenance import describe, read_provenance
from wanda_dvc.study.tensors import (
    block_count,
    block_file,
    finished_blocks,
    read_stats,
    seal,
    write_fisher,
    write_grams,
    write_stats,
)


def calibrate(*, project: Project) -> None:
    """models/dense + data/calibration → stats/, gram/, fisher/. The last two have no blocks where not asked for."""
    model = model_provenance(project, "dense")
    check_ready(project, "dense", project.params.calibration.length, "calibration.length")
    text = read_provenance(project.data("calibration"), "download calibration")
    made_from = describe(
        "stats",
        version=STAGES["calibrate"].version,
        libraries=("torch", "transformers"),
        model={"source": model["source"], "sha256": model["sha256"]},
        text={"source": text["source"], "sha256": text["sha256"]},
        params=calibrated_with(project.params),
    )
    kept, windows_back = project.params.calibration.gram, project.params.calibration.fisher
    grams_from = made_from | {"kind": "gram", "dtype": kept}
    fisher_from = made_from | {"kind": "fisher", "windows": windows_back}
    with (
        project.work(made_from) as work,
        project.work(grams_from) as beside,
        project.work(fisher_from) as back,
        runner(project, "dense", work) as run,
    ):
        check_fits(project, run.decoder.inputs())
        finished = finished_blocks(work.out)
        if kept != "none":
            finished = min(finished, finished_blocks(beside.out))
        windows, blocks = calibration_windows(project), range(len(run.decoder.blocks))
        for turn in progress(run.walk(windows, kept=finished), total=len(blocks), what="calibrate, blocks"):
            measured, grams, _ = turn.record(gram=kept != "none")
            write_stats(work.out, turn.index, measured)
            if kept != "none":
                write_grams(beside.out, turn.index, measured, grams, kept)
        say_unreached("calibrate", {block: read_stats(work.out, block).unreached() for block in blocks})
        if windows_back:
            # In this process, whoever ran the windows forward: they are few.
            decoder = open_decoder(project, "dense") if project.params.runtime.workers else run.decoder
            if not all(block_file(back.out, block).is_file() for block in blocks):
                made = squared_gradients(decoder, windows[:windows_back], back.path)
                for block, sums in progress(made, total=len(blocks), what="calibrate, blocks back"):
                    write_fisher(back.out, block, sums)
        seal(work.out, made_from)
        seal(beside.out, grams_from)
        seal(back.out, fisher_from)
        work.publish(project.stats)
        beside.publish(project.gram)
        back.publish(project.fisher)
    _write_norms(project)


def _write_norms(project: Project) -> None:
    """Write the norms by block, for plots."""
    rows: list[list[object]] = []
    for block in range(block_count(project.stats, "calibrate")):
        stats = read_stats(project.stats, block)
        for name, x in stats.inputs.items():
            rows.append([block, stats.label(name), len(x.norm), *summary(x.norm).values()])
    headers = ["block", "input", "features", "mean", "median", "largest", "outliers"]
    write_csv(project.plots("norms"), headers, rows)


def need(project: Project, _: str | None = None) -> Need:
    """A walk that records, the hidden states that wait between blocks, the Gram matrices, and the way back."""
    calibration, folder = project.params.calibration, project.model("dense")
    walk = calibration_need(project, gram=calibration.gram != "none")
    if walk.disk is None:
        return walk
    model, dtype = sizes(folder), project.params.dtype
    disk = walk.disk + gram_bytes(model, calibration.gram)
    if not calibration.fisher or walk.memory is None:
        return replace(walk, disk=disk)
    back = differentiating(model, dtype=dtype, length=calibration.length)
    return replace(walk, memory=either(walk.memory, back), disk=disk + _back_bytes(project.params, model))


def cost(params: Params, on: Setting) -> Cost:
    """All windows through all blocks, and some of them once more forward and back."""
    calibration = params.calibration
    once = calibration_cost(params, on, gram=calibration.gram != "none")
    once = replace(once, disk=once.disk + gram_bytes(on.model, calibration.gram))
    if not calibration.fisher:
        return once
    memory = differentiating(on.model, dtype=on.dtype, length=calibration.length)
    # Forward, then in each block forward again and back, which takes as long: weights get no gradients.
    windows, length = calibration.fisher, calibration.length
    back = replace(on, workers=1).walk(3 * windows, length, memory, logits=2 * windows * length)
    return replace(
        once,
        flops=once.flops + back.flops,
        read=once.read + 2 * back.read,
        hidden=once.hidden + back.hidden,
        seconds=once.seconds + back.seconds,
        disk=once.disk + _back_bytes(params, on.model),
        memory=either(once.memory, memory),
    )


def _back_bytes(params: Params, model: Sizes) -> int:
    """Return the bytes of hidden states before every block, and of the gradients between two, while they wait."""
    tokens = params.calibration.fisher * params.calibration.length
    states = waiting_bytes(model, tokens, params.dtype) // 2
    return states * (model.blocks + 1) + waiting_bytes(model, tokens, "float32")
