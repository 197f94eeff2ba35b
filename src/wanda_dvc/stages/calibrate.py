"""Measure the dense model's activations once for each distinct input: the norm tier, and if asked the Gram tier."""

from dataclasses import replace

from wanda_dvc.engine.costs import Cost, Setting
from wanda_dvc.engine.sizes import Need, sizes
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
    runner,
)
from wanda_dvc.stages.running import progress, say_unreached
from wanda_dvc.study.files import write_csv
from wanda_dvc.study.project import Project
from wanda_dvc.study.provenance import describe, read_provenance
from wanda_dvc.study.tensors import block_count, finished_blocks, read_stats, seal, write_grams, write_stats


def calibrate(*, project: Project) -> None:
    """models/dense + data/calibration → stats/, gram/. Without `calibration.gram` the latter has no blocks."""
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
    kept = project.params.calibration.gram
    grams_from = made_from | {"kind": "gram", "dtype": kept}
    with (
        project.work(made_from) as work,
        project.work(grams_from) as beside,
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
        seal(work.out, made_from)
        seal(beside.out, grams_from)
        work.publish(project.stats)
        beside.publish(project.gram)
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
    """A walk that records, the hidden states that wait between blocks, and the Gram matrices."""
    kept, folder = project.params.calibration.gram, project.model("dense")
    walk = calibration_need(project, gram=kept != "none")
    if walk.disk is None or kept == "none":
        return walk
    grams = gram_bytes(sizes(folder), kept)
    return replace(walk, disk=walk.disk + grams)


def cost(params: Params, on: Setting) -> Cost:
    """All windows through all blocks."""
    kept = params.calibration.gram
    once = calibration_cost(params, on, gram=kept != "none")
    return replace(once, disk=once.disk + gram_bytes(on.model, kept))
