"""Measure the dense model's activations once: the norm tier of each distinct input.

Optional: the Gram tier, and the gradients tier (the gradients by each linear's outputs).
"""

from wanda_dvc.errors import notice
from wanda_dvc.params import Calibration
from wanda_dvc.plan import GRAM_DTYPE, TOKENS_A_FEATURE
from wanda_dvc.pruning.statistics import summary
from wanda_dvc.stages import STAGES
from wanda_dvc.stages.inputs import (
    calibrated_with,
    calibration_windows,
    check_fits,
    check_ready,
    runner,
)
from wanda_dvc.stages.needs import back_windows
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
    """models/dense + data/calibration → stats/norms, stats/gram, stats/gradients.

    A tier that is not selected has no blocks.
    """
    model = check_ready(project, "dense", project.params.calibration.length, "calibration.length")
    text = read_provenance(project.data("calibration"), "download calibration")
    norms_from = describe(
        "calibrate",
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
        norms, gram, gradients = work.part("norms"), work.part("gram"), work.part("gradients")
        features = run.decoder.inputs()
        check_fits(project, features)
        if keeps_grams:
            _check_tokens(project.params.calibration, max(features.values()))
        windows, blocks = calibration_windows(project), range(len(run.decoder.blocks))
        finished = min(map(finished_blocks, [norms, gram] if keeps_grams else [norms]))
        for step in progress(run.walk(windows, kept=finished), total=len(blocks), what="calibrate, blocks"):
            measured, grams, _ = step.record(gram=keeps_grams)
            write_stats(norms, step.index, measured)
            if keeps_grams:
                write_grams(gram, step.index, measured, grams)
        say_unreached("calibrate", {block: read_stats(norms, block).unreached() for block in blocks})
        finished = finished_blocks(gradients, reversed(blocks))
        if windows_back and finished < len(blocks):
            from wanda_dvc.engine.fisher import backward  # imports transformers, which takes seconds

            back = backward(run, windows[:windows_back], gram=True, kept=finished)
            for block, came in progress(back, total=len(blocks), what="calibrate, blocks back"):
                write_fisher(gradients, block, came.sums, came.grams)
                came.grams.clear()  # before the next block's arrive; other frames hold them too
        seal(norms, norms_from)
        seal(gram, norms_from | {"dtype": GRAM_DTYPE if keeps_grams else "none"})
        seal(
            gradients,
            norms_from | {"dtype": GRAM_DTYPE if windows_back else "none", "windows": windows_back},
        )
        work.publish(project.stats.parent)
    _write_norms(project)


def _check_tokens(calibration: Calibration, features: int) -> None:
    """Report too few calibration tokens for solvers, by the widest input of the model."""
    if (tokens := calibration.windows * calibration.length) < TOKENS_A_FEATURE * features:
        notice(
            f"calibrate: {calibration.windows} windows of {calibration.length} make {tokens:,} tokens, expected "
            f"{TOKENS_A_FEATURE * features:,} or more for solvers, {TOKENS_A_FEATURE} for each of {features:,} input "
            "features; raise calibration.length or calibration.windows"
        )


def _write_norms(project: Project) -> None:
    """Write the norms by block, for plots."""
    rows: list[list[object]] = []
    for block in range(block_count(project.stats, "calibrate")):
        stats = read_stats(project.stats, block)
        for name, x in stats.inputs.items():
            rows.append([block, stats.label(name), len(x.norm), *summary(x.norm).values()])
    headers = ["block", "input", "features", "mean", "median", "largest", "outliers"]
    write_csv(project.plots("norms"), headers, rows)
