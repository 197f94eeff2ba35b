"""Choose what stays: scores from weights and statistics, `keep` masks from scores."""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from wanda_dvc.engine.checkpoint import Checkpoint
from wanda_dvc.engine.memory import keep_freed_memory
from wanda_dvc.errors import UserError
from wanda_dvc.params import Params
from wanda_dvc.pruning.methods import METHODS
from wanda_dvc.pruning.patterns import check_pattern
from wanda_dvc.pruning.selection import WEIGHTS_AT_A_TIME
from wanda_dvc.pruning.statistics import BlockStats, InputStats
from wanda_dvc.stages import STAGES, progress, say_unreached
from wanda_dvc.study.project import Project, Work
from wanda_dvc.study.provenance import describe, digest, read_provenance, write_provenance
from wanda_dvc.study.tensors import block_count, read_stats, write_masks


def mask(*, project: Project) -> None:
    """models/dense + stats/ (+ data/calibration for `propagation: pruned`) → masks/"""
    keep_freed_memory()
    params = project.params
    model = read_provenance(project.model("dense"), "download model")
    stats = read_provenance(project.stats, "calibrate")
    if stats["model"]["sha256"] != model["sha256"]:
        raise UserError(
            f"stats/: measured on {stats['model']['source']}, expected {model['source']}, the model in models/dense; "
            "run `dvc repro` or `wanda-dvc calibrate`"
        )
    if stats["params"] != params.calibrated_with():
        raise UserError(
            f"stats/: measured with {stats['params']}, expected {params.calibrated_with()} as params.yaml has it; "
            "run `dvc repro` or `wanda-dvc calibrate`"
        )
    checkpoint = Checkpoint(project.model("dense"))
    blocks = block_count(project.stats)
    features: dict[str, int] = {}
    for block in range(blocks):
        measured = read_stats(project.stats, block)
        for source, names in measured.readers.items():
            features |= dict.fromkeys(names, len(measured.inputs[source].sum))
    check_pattern(params.pattern, features)
    made_from = describe(
        "masks",
        version=STAGES["mask"],
        libraries=("torch", "numpy"),
        model=stats["model"],
        stats=digest(stats),
        calibration={"text": stats["text"], **stats["params"]},
        params={
            "method": params.method,
            "sparsity": params.sparsity,
            "pattern": params.pattern,
            "group": params.group,
            "propagation": params.propagation,
        },
    )
    with project.work(made_from) as work:
        if params.propagation == "pruned" and METHODS[params.method].needs_inputs:
            _propagate(project, checkpoint, work)
        else:
            unreached = {}
            for block in progress(range(blocks), total=blocks, what="mask, blocks"):
                measured = read_stats(project.stats, block)
                unreached[block] = measured.unreached()
                write_masks(work.out, block, choose(params, checkpoint, measured))
            if METHODS[params.method].needs_inputs:
                say_unreached("mask", unreached)
        write_provenance(work.out, made_from)
        work.publish(project.masks)


def _propagate(project: Project, checkpoint: Checkpoint, work: Work) -> None:
    """The paper's procedure: each block is calibrated on what the pruned blocks before it put out."""
    # Only here is a model run: without the engine and transformers a further sparsity starts seconds earlier.
    from wanda_dvc.engine.recorder import InputRecorder
    from wanda_dvc.stages.calibrate import calibration_windows, open_decoder

    decoder = open_decoder(project, "dense")
    steps = decoder.walk(calibration_windows(project), work.path)
    unreached = {}
    for step in progress(steps, total=len(decoder.blocks), what="mask, blocks calibrated and pruned"):
        recorder = InputRecorder()
        step.advance(recorder)
        measured = recorder.result()
        unreached[step.index] = measured.unreached()
        keeps = choose(project.params, checkpoint, measured)
        write_masks(work.out, step.index, keeps)
        step.prune(keeps)
        step.advance()
    say_unreached("mask", unreached)  # of the blocks that this run has calibrated


def choose(params: Params, checkpoint: Checkpoint, block: BlockStats) -> dict[str, Tensor]:
    """The `keep` masks of one block's linears, oriented as their weights are stored."""
    method = METHODS[params.method]

    def keep(name: str, x: InputStats) -> Tensor:
        weight = checkpoint.weight(name)
        kept = torch.empty(weight.shape, dtype=torch.bool)
        weight, chosen = (weight.T, kept.T) if name in block.transposed else (weight, kept)
        at_a_time = len(weight)
        if method.rows_apart(params.pattern, params.group):  # in memory that does not grow with the linear
            at_a_time = max(1, WEIGHTS_AT_A_TIME // weight.shape[1])
        for rows, into in zip(weight.split(at_a_time), chosen.split(at_a_time), strict=True):
            score = method.score(rows.contiguous(), x)
            if not score.amax().isfinite():
                raise UserError(f"{name}: scores that are not finite; its weights or the activations it reads overflow")
            into.copy_(method.select(score, sparsity=params.sparsity, pattern=params.pattern, group=params.group))
        return kept

    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:  # partitioning holds no lock
        jobs = {
            name: pool.submit(keep, name, block.inputs[source])
            for source, names in block.readers.items()
            for name in names
        }
        return {name: job.result() for name, job in jobs.items()}
