"""Measure the dense model's activations once: the statistics that the plan asks for."""

import math
from collections.abc import Sequence
from fractions import Fraction

from wanda_dvc.catalog import STRUCTURES, methods
from wanda_dvc.engine import depth
from wanda_dvc.engine.backward import backward
from wanda_dvc.engine.sequences import TokenSequence
from wanda_dvc.errors import notice
from wanda_dvc.plan import GRAM_DTYPE, TOKENS_OF_CHOICES
from wanda_dvc.pruning.statistics import BlockStats
from wanda_dvc.pruning.units import count_kept
from wanda_dvc.reading import is_there
from wanda_dvc.stages import STAGES, inputs
from wanda_dvc.stages.needs import announce
from wanda_dvc.stages.process import progress
from wanda_dvc.study import artifact, tensors
from wanda_dvc.study.artifact import PROVENANCE, Work, describe, read_provenance
from wanda_dvc.study.files import Json, write_json
from wanda_dvc.study.folder import Study


def calibrate(*, study: Study, statistics: str) -> None:
    """models/dense + data/calibration → stats/norms, stats/gram, stats/fisher or stats/blocks.

    Each kind of statistics is a stage of its own, so that each is measured once, in any order of recipes. If the plan
    asks for norms and Gram matrices, one pass measures both, and the Gram matrices wait in their own unfinished work.
    """
    inputs.check_ready(study, "dense", study.stage_input("calibrate/norms")["length"], "calibration.length")
    made_from, expected_gram = calibrated_from(study, statistics), calibrated_from(study, "gram")
    with study.work(made_from) as work:
        if not is_there(work.out / PROVENANCE):  # else it was measured with the norms
            if statistics == "blocks":
                _choose_blocks(study, work)
            elif statistics == "fisher":
                _backward(study, work, made_from["windows_back"])
            elif statistics == "gram":
                _forward(study, gram=work)
            elif study.stage_input("calibrate/gram") and inputs.stored_gram(study) != expected_gram:
                with study.work(expected_gram) as gram:
                    made_from |= _forward(study, norms=work, gram=gram)
                    artifact.finish(gram.out, expected_gram)  # and it waits: `calibrate gram` commits it
            else:
                made_from |= _forward(study, norms=work)
            if statistics == "blocks":
                artifact.write_provenance(work.out, made_from)
            else:
                artifact.finish(work.out, made_from)
        work.commit(study.root / "stats" / statistics)


def calibrated_from(study: Study, statistics: str) -> Json:
    """Return the provenance of `norms`, `gram`, `fisher` or `blocks`, without its number of blocks."""
    model = read_provenance(study.model("dense"), "download model")
    text = read_provenance(study.data("calibration"), "download calibration")
    params = study.stage_input("calibrate/norms") | {"dtype": inputs.model_dtype(study)}
    made_from = describe(
        "calibrate",
        version=STAGES["calibrate"].version,
        libraries=("torch", "transformers"),
        model={"source": model["source"], "sha256": model["sha256"]},
        text={"source": text["source"], "sha256": text["sha256"]},
        params=params,
    )
    if statistics in ("gram", "fisher"):
        made_from["dtype"] = GRAM_DTYPE
    if statistics == "fisher":
        made_from["windows_back"] = study.stage_input("calibrate/fisher")["windows_back"]
    if statistics == "blocks":
        made_from["sparsity"] = study.stage_input("calibrate/blocks")["sparsity"]
    return made_from


def _forward(study: Study, *, norms: Work | None = None, gram: Work | None = None) -> Json:
    """Run all windows through all blocks, and write the norms and Gram matrices of each distinct input.

    Return what `inputs.check_distinct` reads.
    """
    works = [work for work in (norms, gram) if work is not None]
    run = inputs.runner(study, "dense", works[0])
    sizes = run.decoder.sizes
    announce(study, "calibrate", sizes)
    drawn = inputs.draw_calibration(study)
    counts = {"distinct": drawn.distinct, "widest": sizes.widest}
    few_tokens = inputs.check_distinct(study, **counts)
    if few_tokens and (study.plan.solves or study.stage_input("calibrate/gram")):
        notice(f"calibrate: {few_tokens}; raise calibration.length or calibration.windows, or take a longer text")
    finished = min(artifact.finished_blocks(work.out) for work in works)
    unreached = 0  # experts of the blocks that this run measures
    steps = run.forward(drawn.tokens, finished=finished)
    for step in progress(steps, total=sizes.blocks, what="calibrate, blocks", at=lambda step: step.index):
        measured, grams = step.record(gram=gram is not None)
        unreached += len(measured.unreached())
        if norms:
            tensors.write_stats(norms.out, step.index, measured)
        if gram:
            tensors.write_grams(gram.out, step.index, measured, grams)
            grams.clear()  # before the next block's arrive; other frames refer to them too
    if norms and unreached:
        notice(
            f"calibrate: no calibration token reached {unreached} experts; Wanda judges their weights by magnitude, "
            "and REAP removes them first. More calibration windows reach more experts."
        )
    return counts


def _backward(study: Study, work: Work, windows: int) -> None:
    """Run the first `windows` forward and back, and write each linear's gradients by its outputs, last block first."""
    run = inputs.runner(study, "dense", work)
    announce(study, "calibrate", run.decoder.sizes)
    blocks = len(run.decoder.blocks)
    finished = artifact.finished_blocks(work.out, reversed(range(blocks)))
    steps = backward(run, inputs.draw_calibration(study).tokens[:windows], finished=finished)
    for block, gradients in progress(steps, total=blocks, what="calibrate, backward", at=lambda x: blocks - 1 - x[0]):
        # A Gram matrix of gradients is of one linear's outputs: it has no input, and no weight to be transposed.
        linears = {name: [name] for name in gradients.grams}
        stats = BlockStats({}, linears, [], gradients.squares, unit_costs=gradients.unit_costs)
        tensors.write_grams(work.out, block, stats, gradients.grams)
        gradients.grams.clear()


def _choose_blocks(study: Study, work: Work) -> None:
    """Measure which blocks to remove, one after another, and write the best choice of each number of them."""
    plan, sparsity = study.plan, Fraction(str(study.stage_input("calibrate/blocks")["sparsity"]))
    run = inputs.runner(study, "dense", work)
    inputs.removal_of(run.decoder.checkpoint, plan, run.decoder.device)  # UserError if its blocks are not found
    blocks = len(run.decoder.blocks)
    number = blocks - count_kept(blocks, sparsity)
    announce(study, "calibrate", run.decoder.sizes)
    windows = inputs.draw_calibration(study).tokens
    texts = study.stage_input("calibrate/norms")["shares"]  # their windows take turns
    count = max(math.ceil(TOKENS_OF_CHOICES / windows.shape[1]), len(texts))
    sequences = [TokenSequence(window) for window in windows[:count]]
    choices, choose_one_more = inputs.read_choices(work.out), methods()[STRUCTURES["blocks"].method]
    dense = depth.measure_dense(run, sequences)

    def measure(groups: Sequence[depth.Blocks]) -> list[float]:
        return list(depth.measure_choices(run, sequences, groups, dense))

    for _ in progress(range(len(choices), number), total=number, what="calibrate, blocks chosen", at=int):
        choices.append(choose_one_more(choices[-1] if choices else depth.no_choice(blocks), measure))
        write_json(work.out / inputs.CHOICES_FILE, {"choices": [choice._asdict() for choice in choices]})
