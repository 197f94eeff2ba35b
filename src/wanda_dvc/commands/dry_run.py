"""`wanda-dvc prune --dry-run`: what a run fetches and needs, from the model's config.json alone."""

import math
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

from wanda_dvc.catalog import EMBEDDED
from wanda_dvc.commands.prune import settings_for_model
from wanda_dvc.commands.request import PruneRequest
from wanda_dvc.engine.accelerator import multiplies_natively
from wanda_dvc.engine.depth import count_measured
from wanda_dvc.engine.memory import ModelSizes
from wanda_dvc.kernels import multiply
from wanda_dvc.params import Params, download_sources, nested
from wanda_dvc.plan import MEASURED_BLOCKS, TOKENS_OF_CHOICES, WINDOWS_BACK
from wanda_dvc.pruning.solvers import ADMM_ITERATIONS
from wanda_dvc.results.show import pruning_label
from wanda_dvc.stages.device import own_device
from wanda_dvc.stages.download import find_model_config
from wanda_dvc.stages.needs import Conditions, free, gigabytes, requirements, solver_requirements
from wanda_dvc.study.folder import Study
from wanda_dvc.study.scaffold import new_params

SIDE = 2048  # of the matrices of the measured product


def describe_run(request: PruneRequest) -> str:
    """Return what a request would fetch, its calibration, memory, disk and time. Only a config.json is fetched."""
    study = Study(request.root).with_params(request.params)
    config = find_model_config(study)
    if config is None:
        needs = ["Tokens, memory, disk and time are known after the download: a package has no config.json."]
    else:
        sizes = ModelSizes.read(config)
        study = study.with_params(new_params(nested(settings_for_model(request, config, sizes)))[0])
        needs = _needs_of_run(study, sizes, evaluate=request.evaluate)
    params = study.params
    lines = [
        f"{params.model}: {pruning_label(params)}, sparsity {float(params.plan.sparsity):g}, into {request.target}",
        f"Fetched unless present: {_fetched(params)}.",
        *needs,
        "This was a dry run: nothing was pruned.",
    ]
    return "\n".join(lines)


def _fetched(params: Params) -> str:
    """Return the sources on the network that a run reads."""
    sources = []
    for name, (_, source) in download_sources(params).items():
        is_local = Path(source).is_absolute() or source in (EMBEDDED, "none")
        if not is_local and name != "tasks":  # which `prune` does not run
            sources.append(f"{source} ({name})")
    return ", ".join(sources) or "nothing"


def _needs_of_run(study: Study, sizes: ModelSizes, *, evaluate: bool) -> list[str]:
    params, available = study.params, free(study)
    stages = ["calibrate", *(["recover"] if params.recovery.tokens else []), *(["perplexity"] if evaluate else [])]
    needs = {stage: requirements(study, stage, sizes, available["memory"]) for stage in stages}
    solver = solver_requirements(study, sizes)
    memory = {stage: need.memory for stage, need in needs.items()} | ({"solver": solver.memory} if solver else {})
    largest = max(memory, key=memory.__getitem__)
    disk = sum(need.disk for need in needs.values()) + 2 * sizes.stored + sizes.linear_weights // 8
    calibration = params.calibration
    tokens = calibration.windows * calibration.length
    return [
        f"Model: {sizes.parameters:,} parameters, {gigabytes(sizes.stored)}.",
        f"Calibration: {calibration.windows} windows of {calibration.length} tokens, {tokens:,} in all.",
        f"Memory: about {gigabytes(memory[largest])} ({largest}); free: {gigabytes(available['memory'])}.",
        f"Disk: at most {gigabytes(disk)}, with the dense and the pruned model; free: {gigabytes(available['disk'])}.",
        _time(study, sizes, evaluate=evaluate),
    ]


def _time(study: Study, sizes: ModelSizes, *, evaluate: bool) -> str:
    """Return a sentence on the time: operations of products, over the speed of this machine's products."""
    device = own_device(study.params.runtime)
    dtype: torch.dtype = getattr(torch, Conditions(study, sizes).dtype)
    if device.type == "cpu" and not multiplies_natively(dtype):
        dtype = torch.float32
    forward, solving = _operations(study.params, sizes, evaluate=evaluate)
    seconds = forward / _speed(device, dtype) + solving / _speed(device, torch.float32)
    return (
        f"Time: about {max(seconds / 60, 0.1):,.1f} minutes for {(forward + solving) / 1e12:,.1f} TFLOP, at the speed "
        f"of products on {device}, measured for half a second. Attention, files and starts are not counted."
    )


def _operations(params: Params, sizes: ModelSizes, *, evaluate: bool) -> tuple[float, float]:
    """Return the operations of passes through the model, and of solvers."""
    plan, calibration, perplexity = params.plan, params.calibration, params.perplexity
    tokens = calibration.windows * calibration.length
    backward_tokens = min(WINDOWS_BACK, calibration.windows) * calibration.length
    with_head = sizes.linear_weights + sizes.hidden * sizes.vocabulary
    models = 3 if params.recovery.tokens else 2
    passes = 2.0 * tokens * sizes.linear_weights * (3 if plan.propagates else 1)
    if "gram" in params.statistics:
        passes += tokens * sizes.all_input_squares  # one triangle
    if "fisher" in params.statistics:
        passes += backward_tokens * (6 * with_head + sizes.all_output_squares)
    if plan.measures_blocks:  # half of the blocks run for a choice, on average
        number = math.ceil(max(MEASURED_BLOCKS, float(plan.sparsity)) * sizes.blocks)
        passes += count_measured(sizes.blocks, number) * TOKENS_OF_CHOICES * with_head
    passes += 10 * params.recovery.tokens * with_head  # forward of two models, and backward with a repeated forward
    if evaluate and isinstance(perplexity.windows, int):
        passes += 2.0 * models * len(perplexity.texts) * perplexity.windows * perplexity.length * with_head
    steps = plan.used_reconstruction.steps + (ADMM_ITERATIONS if plan.method.needs == "gram" else 0)
    solving = 2.0 * steps * sizes.solved_by_input
    if plan.used_reconstruction.uses_fisher:
        solving += 2.0 * plan.used_reconstruction.steps * sizes.solved_by_output
    return passes, solving


def _speed(device: torch.device, dtype: torch.dtype) -> float:
    """Return the measured operations a second of products of matrices."""
    matrix = torch.ones(SIDE, SIDE, dtype=dtype, device=device)
    variables = {"multiply": multiply, "matrix": matrix}
    timer = Timer("multiply(matrix, matrix)", globals=variables, num_threads=torch.get_num_threads())
    return 2 * SIDE**3 / timer.blocked_autorange(min_run_time=0.25).mean
