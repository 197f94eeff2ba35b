"""Measure the dense model's activations once for each distinct input: the norm tier, and if asked the Gram tier.

And if asked the Fisher tier of each linear's outputs, and the Gram matrices of their gradients.
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
    block_file,
    finished_blocks,
    read_stats,
    seal,
    write_fisher,
    write_gradients,
    write_grams,
    write_stats,
)


def calibrate(*, project: Project) -> None:
    """models/dense + data/calibration → stats/, gram/, fisher/, fisher_gram/.

    All but the first have no blocks where they are not asked for.
    """
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
    calibration = project.params.calibration
    kept = "none" if calibration.statistics == "norms" else GRAM_DTYPE
    windows_back = back_windows(calibration)
    kept_back = GRAM_DTYPE if windows_back else "none"
    grams_from = made_from | {"kind": "gram", "dtype": kept}
    fisher_from = made_from | {"kind": "fisher", "windows": windows_back}
    gram = kept_back != "none"
    gradients_from = made_from | {"kind": "fisher_gram", "dtype": kept_back, "windows": windows_back * gram}
    with (
        project.work(made_from) as work,
        project.work(grams_from) as beside,
        project.work(fisher_from) as back,
        project.work(gradients_from) as beside_back,
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
            folders = [back.out, beside_back.out] if gram else [back.out]
            if gram and any(
                block_file(beside_back.out, x).is_file() > block_file(back.out, x).is_file() for x in blocks
            ):
                beside_back.forget()  # what goes with it was published, by a run that was killed or one without it
            done = [all(block_file(folder, block).is_file() for folder in folders) for block in reversed(blocks)]
            if not all(done):
                made = run.backward(windows[:windows_back], gram=gram, kept=done.index(False))
                for block, came in progress(made, total=len(blocks), what="calibrate, blocks back"):
                    write_fisher(back.out, block, came.sums)
                    if gram:
                        write_gradients(beside_back.out, block, came.grams, kept_back)
                        came.grams.clear()  # before there are those of the next block; other frames hold them too
        seal(work.out, made_from)
        seal(beside.out, grams_from)
        seal(back.out, fisher_from)
        seal(beside_back.out, gradients_from)
        work.publish(project.stats)
        beside.publish(project.gram)
        back.publish(project.fisher)
        beside_back.publish(project.fisher_gram)
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
    """Return the bytes of fisher_gram/, and of hidden states before every block and gradients between two."""
    tokens = back_windows(params.calibration) * params.calibration.length
    states = waiting_bytes(model, tokens, params.dtype) // 2
    kept = gram_bytes(model.all_output_squares, True)
    return kept + states * (model.blocks + 1) + waiting_bytes(model, tokens, "float32")
