"""Measure the dense model's activations once: the norm tier of each distinct input.

The plan may ask for the Gram tier too, and for the gradients by each linear's outputs.
"""

from wanda_dvc.errors import notice
from wanda_dvc.plan import GRAM_DTYPE, TOKENS_A_FEATURE, WINDOWS_BACK
from wanda_dvc.pruning.statistics import summary
from wanda_dvc.reading import is_there
from wanda_dvc.stages import STAGES
from wanda_dvc.stages.inputs import calibrated_with, calibration_windows, check_fits, check_ready, runner
from wanda_dvc.stages.running import progress, say_unreached
from wanda_dvc.study.files import Json, write_csv
from wanda_dvc.study.project import Project, Work
from wanda_dvc.study.provenance import PROVENANCE, describe, read_provenance
from wanda_dvc.study.tensors import (
    block_count,
    finished_blocks,
    read_stats,
    seal,
    write_fisher,
    write_grams,
    write_stats,
)


def calibrate(*, project: Project, tier: str) -> None:
    """models/dense + data/calibration → stats/norms, stats/gram or stats/gradients.

    A tier that nothing reads has no blocks. The tiers are stages of their own, so that each is measured once, in any
    order of recipes.
    """
    measured = _is_measured(project, tier)
    if measured:
        check_ready(project, "dense", project.planned("calibrate/norms")["length"], "calibration.length")
    made_from = _described(project, tier)
    with project.work(made_from) as work:
        if measured and not is_there(work.out / PROVENANCE):  # else measured with the norms
            if tier == "gradients":
                _backward(project, work)
            else:
                _forward(project, tier, work)
        seal(work.out, made_from)
        work.publish(project.root / "stats" / tier)
    if tier == "norms":
        _write_norms(project)


def _is_measured(project: Project, tier: str) -> bool:
    measured: bool = project.planned(f"calibrate/{tier}")["measured"]
    return measured


def _described(project: Project, tier: str) -> Json:
    """Return the provenance of a tier."""
    model = read_provenance(project.model("dense"), "download model")
    text = read_provenance(project.data("calibration"), "download calibration")
    params = calibrated_with(project)
    described = describe(
        "calibrate",
        version=STAGES["calibrate"].version,
        libraries=("torch", "transformers"),
        model={"source": model["source"], "sha256": model["sha256"]},
        text={"source": text["source"], "sha256": text["sha256"]},
        params=params,
    )
    if tier == "norms":
        return described
    described["dtype"] = GRAM_DTYPE if _is_measured(project, tier) else "none"
    if tier == "gradients":
        described["windows"] = min(WINDOWS_BACK, params["windows"]) if _is_measured(project, tier) else 0
    return described


def _forward(project: Project, tier: str, work: Work) -> None:
    """Run all windows through all blocks, and write the norms or the Gram matrices of each distinct input.

    If the plan asks for both, one pass measures both; the Gram matrices wait in their own unfinished work.
    """
    if tier == "gram":
        _pass(project, None, work)
    elif _is_measured(project, "gram"):
        made_from = _described(project, "gram")
        with project.work(made_from) as other:
            _pass(project, work, other)
            seal(other.out, made_from)
    else:
        _pass(project, work, None)


def _pass(project: Project, norms: Work | None, gram: Work | None) -> None:
    """Run all windows through all blocks. A killed run resumes after the blocks that all works have."""
    works = [work for work in (norms, gram) if work]
    with runner(project, "dense", works[0]) as run:
        features = run.decoder.inputs()
        check_fits(project, features)
        windows, blocks = calibration_windows(project), len(run.decoder.blocks)
        if gram:
            _check_tokens(windows.numel(), max(features.values()))
        kept = min(finished_blocks(work.out) for work in works)
        unreached = {}
        for step in progress(run.walk(windows, kept=kept), total=blocks, what="calibrate, blocks"):
            measured, grams, _ = step.record(gram=gram is not None)
            unreached[step.index] = measured.unreached()
            if norms:
                write_stats(norms.out, step.index, measured)
            if gram:
                write_grams(gram.out, step.index, measured, grams)
    if norms:
        say_unreached("calibrate", unreached)  # of the blocks measured by this run


def _backward(project: Project, work: Work) -> None:
    """Run some windows forward and back, and write the gradients by the outputs of each linear, last block first."""
    from wanda_dvc.engine.walk import backward  # imports transformers, which takes seconds

    with runner(project, "dense", work) as run:
        check_fits(project, run.decoder.inputs())
        blocks = len(run.decoder.blocks)
        kept = finished_blocks(work.out, reversed(range(blocks)))
        back = backward(run, calibration_windows(project)[:WINDOWS_BACK], gram=True, kept=kept)
        for block, came in progress(back, total=blocks, what="calibrate, blocks back"):
            write_fisher(work.out, block, came.sums, came.grams)
            came.grams.clear()  # before the next block's arrive; other frames hold them too


def _check_tokens(tokens: int, features: int) -> None:
    """Report too few calibration tokens for solvers, by the widest input of the model."""
    if tokens < TOKENS_A_FEATURE * features:
        notice(
            f"calibrate: {tokens:,} tokens, expected {TOKENS_A_FEATURE * features:,} or more for solvers, "
            f"{TOKENS_A_FEATURE} for each of {features:,} input features; raise calibration.length or "
            "calibration.windows"
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
