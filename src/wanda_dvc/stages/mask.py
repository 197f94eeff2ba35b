"""Choose what stays: scores from weights and statistics, `keep` masks from scores."""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from wanda_dvc.artifacts import (
    Project,
    block_count,
    describe,
    digest,
    read_provenance,
    read_stats,
    write_masks,
    write_provenance,
)
from wanda_dvc.checkpoint import Checkpoint
from wanda_dvc.errors import UserError
from wanda_dvc.input_stats import InputStats
from wanda_dvc.methods import METHODS
from wanda_dvc.patterns import parse_pattern
from wanda_dvc.selection import select
from wanda_dvc.stages import STAGES, progress


def mask(*, project: Project) -> None:
    """models/dense + stats/ → masks/"""
    params = project.params
    model = read_provenance(project.model("dense"), "download model")
    stats = read_provenance(project.stats, "calibrate")
    if stats["model"]["sha256"] != model["sha256"]:
        raise UserError(
            f"stats/: measured on {stats['model']['source']}, expected {model['source']}, the model in models/dense; "
            "run `dvc repro` or `wanda-dvc calibrate`"
        )
    checkpoint = Checkpoint(project.model("dense"))
    blocks = block_count(project.stats)
    readers = [read_stats(project.stats, block)[1] for block in range(blocks)]
    linears = [name for block in readers for names in block.values() for name in names]
    check_pattern(params.pattern, {name: checkpoint.shape(weight_name(checkpoint, name))[1] for name in linears})
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
        },
    )
    method = METHODS[params.method]

    def keep(name: str, x: InputStats) -> Tensor:
        score = method.score(checkpoint.read(weight_name(checkpoint, name)), x)
        if not score.amax().isfinite():
            raise UserError(f"{name}: scores that are not finite; its weights or the activations it reads overflow")
        return select(score, sparsity=params.sparsity, pattern=params.pattern, group=params.group)

    with project.work(made_from) as work:
        with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:  # partitioning holds no lock
            for block in progress(range(blocks), total=blocks, what="mask, blocks"):
                inputs, names = read_stats(project.stats, block)
                jobs = {name: pool.submit(keep, name, inputs[source]) for source in names for name in names[source]}
                keeps = {name: job.result() for name, job in jobs.items()}
                write_masks(work.out, block, keeps)
        write_provenance(work.out, made_from)
        work.publish(project.masks)


def check_pattern(pattern: str, inputs: dict[str, int]) -> None:
    """UserError, naming every linear whose inputs don't divide into groups of m."""
    if n_of_m := parse_pattern(pattern):
        odd = [f"{name} has {size} inputs" for name, size in inputs.items() if size % n_of_m[1]]
        if odd:
            more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
            raise UserError(
                f"params.yaml: pattern: got {pattern}, but {odd[0]}{more}, expected a multiple of {n_of_m[1]}; "
                "choose another m"
            )


def weight_name(checkpoint: Checkpoint, linear: str) -> str:
    """The stored name of a linear's weight."""
    name = checkpoint.find(f"{linear}.weight")
    if name is None:
        raise UserError(f"{checkpoint.folder}: no weight of {linear}, which the statistics name; run `dvc repro`")
    return name
