"""Measure the dense model's activations once: the norm tier of each distinct input, and if asked the Gram tier.

And if asked the Fisher tier: the gradients by each linear's outputs.
"""

from dataclasses import replace

from wanda_dvc.engine.costs import Cost, Setting
from wanda_dvc.engine.sizes import Need, Sizes, differentiating, either, sizes
from wanda_dvc.params import Calibration, Params
from wanda_dvc.plan import GRAM_DTYPE, WINDOWS_BACK
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
    runner,
    waiting_bytes,
)
from wanda_dvc.stages.running import progress, say_unreached
from wanda_dvc.study.files import write_csv
from wanda_dvc.study.project import Project
from wanda_dvc.study.provenance import describe, read_provenance
from wanda_dvc.study.tensors import (
    block_count,
    finished_blocks,
    read_stats,
    seal,
    write_fisher,
    write_grams,
    write_stats,
)


def calibrate(*, project: Project) -> None:
    """models/dense + data/calibration → stats/norms, stats/gram, stats/fisher.

    A tier that is not asked for has no blocks.
    """
    model = model_provenance(project, "dense")
    check_ready(project, "dense", project.params.calibration.length, "calibration.length")
    text = read_provenance(project.data("calibration"), "download calibration")
    norms_from = describe(
        "stats",
        version=STAGES["calibrate"].version,
        libraries=("torch", "transformers"),
        model={"source": model["source"], "sha256": model["sha256"]},
        text={"source": text["source"], "sha256": text["sha256"]},
        params=calibrated_with(project.params),
    )
    statistics, windows_back = project.params.calibration.statistics, back_windows(project.params.calibration)
    keeps_grams = statistics != "norms"
    with (
        project.work(norms_from | {"statistics": statistics}) as work,
        runner(project, "dense", work) as run,
    ):
        norms, gram, fisher = work.part("norms"), work.part("gram"), work.part("fisher")
        check_fits(project, run.decoder.inputs())
        windows, blocks = calibration_windows(project), range(len(run.decoder.blocks))
        finished = min(map(finished_blocks, [norms, gram] if keeps_grams else [norms]))
        for turn in progress(run.walk(windows, kept=finished), total=len(blocks), what="calibrate, blocks"):
            measured, grams, _ = turn.record(gram=keeps_grams)
            write_stats(norms, turn.index, measured)
            if keeps_grams:
                write_grams(gram, turn.index, measured, grams)
        say_unreached("calibrate", {block: read_stats(norms, block).unreached() for block in blocks})
        finished = finished_blocks(fisher, reversed(blocks))
        if windows_back and finished < len(blocks):
            back = run.backward(windows[:windows_back], gram=True, kept=finished)
            for block, came in progress(back, total=len(blocks), what="calibrate, blocks back"):
                write_fisher(fisher, block, came.sums, came.grams)
                came.grams.clear()  # before there are those of the next block; other frames hold them too
        seal(norms, norms_from)
        seal(gram, norms_from | {"kind": "gram", "dtype": GRAM_DTYPE if keeps_grams else "none"})
        seal(
            fisher,
            norms_from | {"kind": "fisher", "dtype": GRAM_DTYPE if windows_back else "none", "windows": windows_back},
        )
        work.publish(project.stats.parent)
    _write_norms(project)


def back_windows(calibration: Calibration) -> int:
    """Return the number of windows that go back through the model."""
    return min(WINDOWS_BACK, calibration.samples) if calibration.statistics == "fisher" else 0


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
    gram = calibration.statistics != "norms"
    walk = calibration_need(project, gram=gram)
    if walk.disk is None:
        return walk
    model, dtype = sizes(folder), project.params.dtype
    disk = walk.disk + gram_bytes(model.all_squares, gram)
    if not back_windows(calibration) or walk.memory is None:
        return replace(walk, disk=disk)
    workers = project.params.runtime.ray is not None
    back = differentiating(model, dtype=dtype, length=calibration.length, gram=True, workers=workers)
    return replace(walk, memory=either(walk.memory, back), disk=disk + _back_bytes(project.params, model))


def cost(params: Params, on: Setting) -> Cost:
    """All windows through all blocks, and some of them once more forward and back."""
    calibration = params.calibration
    gram, windows = calibration.statistics != "norms", back_windows(calibration)
    once = calibration_cost(params, on, gram=gram)
    once = replace(once, disk=once.disk + gram_bytes(on.model.all_squares, gram))
    if not windows:
        return once
    workers = on.workers > 1
    memory = differentiating(on.model, dtype=on.dtype, length=calibration.length, gram=gram, workers=workers)
    # Three passes: forward, then in each block forward again and back, which takes as long: weights get no gradients.
    length = calibration.length
    one = on.walk(windows, length, memory, logits=2 * windows * length / 3)
    products = gram * windows * length * on.model.all_output_squares
    seconds = 3 * one.seconds + on.share(windows) * products / on.float32_rate
    return replace(
        once,
        flops=once.flops + 3 * one.flops + products,
        read=once.read + 2 * one.read,
        hidden=once.hidden + 3 * one.hidden,
        seconds=once.seconds + seconds + on.sending(windows, gram * 8 * on.model.all_output_squares),
        disk=once.disk + _back_bytes(params, on.model),
        memory=either(once.memory, memory),
    )


def _back_bytes(params: Params, model: Sizes) -> int:
    """Return the bytes of stats/fisher, and of hidden states before every block and gradients between two."""
    tokens = back_windows(params.calibration) * params.calibration.length
    states = waiting_bytes(model, tokens, params.dtype) // 2
    kept = gram_bytes(model.all_output_squares, True)
    return kept + states * (model.blocks + 1) + waiting_bytes(model, tokens, "float32")
