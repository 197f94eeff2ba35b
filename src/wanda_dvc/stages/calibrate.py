"""Measure the dense model's activations once: the tiers of stats/ that the plan asks for."""

from collections.abc import Iterator
from pathlib import Path

from wanda_dvc.errors import notice
from wanda_dvc.plan import GRAM_DTYPE, TOKENS_A_FEATURE, WINDOWS_BACK
from wanda_dvc.pruning.statistics import BlockStats, summary
from wanda_dvc.reading import is_there
from wanda_dvc.stages import STAGES
from wanda_dvc.stages.inputs import calibrated_with, calibration_windows, check_ready, runner, say_unreached
from wanda_dvc.stages.needs import announce
from wanda_dvc.stages.process import progress
from wanda_dvc.study import artifact, tensors
from wanda_dvc.study.artifact import PROVENANCE, Work, describe, read_provenance
from wanda_dvc.study.files import Json, write_csv
from wanda_dvc.study.folder import Study


def calibrate(*, study: Study, statistics: str) -> None:
    """models/dense + data/calibration → stats/norms, stats/gram or stats/fisher.

    The tiers are stages of their own, so that each is measured once, in any order of recipes. If the plan asks for
    norms and Gram matrices, one pass measures both, and the Gram matrices wait in their own unfinished work.
    """
    check_ready(study, "dense", study.stage_input("calibrate/norms")["length"], "calibration.length")
    made_from = _described(study, statistics)
    with study.work(made_from) as work:
        if is_there(work.out / PROVENANCE):  # measured with the norms
            pass
        elif statistics == "fisher":
            _backward(study, work)
        elif statistics == "norms" and study.stage_input("calibrate/gram"):
            gram_from = _described(study, "gram")
            with study.work(gram_from) as gram:
                _forward(study, norms=work, gram=gram)
                artifact.finish(gram.out, gram_from)
        else:
            _forward(study, **{statistics: work})
        artifact.finish(work.out, made_from)
        rows = list(_rows(work.out)) if statistics == "norms" else None  # takes seconds; publishing forgets the run
        work.commit(study.root / "stats" / statistics)
    if rows:
        headers = ["block", "input", "features", "mean", "median", "largest", "outliers"]
        write_csv(study.plots("norms"), headers, rows)


def _rows(folder: Path) -> Iterator[list[object]]:
    for block in range(artifact.block_count(folder, "calibrate")):
        stats = tensors.read_stats(folder, block)
        for name, x in stats.inputs.items():
            if not x.count:
                continue  # of an expert that no token reached: nothing is measured
            consumers = ", ".join(consumer.rpartition(".")[2] for consumer in stats.consumers[name])
            yield [block, consumers, len(x.norm), *summary(x.norm).values()]


def _described(study: Study, statistics: str) -> Json:
    """Return the provenance of a tier."""
    model = read_provenance(study.model("dense"), "download model")
    text = read_provenance(study.data("calibration"), "download calibration")
    params = calibrated_with(study)
    described = describe(
        "calibrate",
        version=STAGES["calibrate"].version,
        libraries=("torch", "transformers"),
        model={"source": model["source"], "sha256": model["sha256"]},
        text={"source": text["source"], "sha256": text["sha256"]},
        params=params,
    )
    if statistics != "norms":
        described["dtype"] = GRAM_DTYPE
    if statistics == "fisher":
        described["windows"] = min(WINDOWS_BACK, params["windows"])
    return described


def _forward(study: Study, *, norms: Work | None = None, gram: Work | None = None) -> None:
    """Run all windows through all blocks, and write the norms and Gram matrices of each distinct input.

    A killed run resumes after the blocks that all works have.
    """
    works = [work for work in (norms, gram) if work]
    announce(study, "calibrate")
    run = runner(study, "dense", works[0])
    windows, blocks = calibration_windows(study), len(run.decoder.blocks)
    each = [linear for index in range(blocks) for linear in run.decoder.linears(index).values()]
    tokens, features = windows.numel(), max(linear.features for linear in each)
    if gram and tokens < TOKENS_A_FEATURE * features:
        notice(
            f"calibrate: {tokens:,} tokens, expected {TOKENS_A_FEATURE * features:,} or more for solvers, "
            f"{TOKENS_A_FEATURE} for each of {features:,} input features; raise calibration.length or "
            "calibration.windows"
        )
    kept = min(artifact.finished_blocks(work.out) for work in works)
    unreached = {}
    walk = run.walk(windows, kept=kept)
    for step in progress(walk, total=blocks, what="calibrate, blocks", at=lambda step: step.index):
        measured, grams, _ = step.record(gram=gram is not None)
        unreached[step.index] = measured.unreached()
        if norms:
            tensors.write_stats(norms.out, step.index, measured)
        if gram:
            tensors.write_grams(gram.out, step.index, measured, grams)
            grams.clear()  # before the next block's arrive; other frames hold them too
    if norms:
        say_unreached("calibrate", unreached)  # of the blocks measured by this run


def _backward(study: Study, work: Work) -> None:
    """Run some windows forward and back, and write the gradients by the outputs of each linear, last block first."""
    from wanda_dvc.engine.backward import backward  # imports transformers, which takes seconds

    announce(study, "calibrate")
    run = runner(study, "dense", work)
    blocks = len(run.decoder.blocks)
    kept = artifact.finished_blocks(work.out, reversed(range(blocks)))
    back = backward(run, calibration_windows(study)[:WINDOWS_BACK], kept=kept)
    for block, came in progress(back, total=blocks, what="calibrate, blocks back", at=lambda one: blocks - 1 - one[0]):
        each = {name: [name] for name in came.grams}  # a matrix is one linear's, in its own orientation
        tensors.write_grams(work.out, block, BlockStats({}, each, [], came.sums), came.grams)
        came.grams.clear()
