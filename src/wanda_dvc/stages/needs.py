"""The memory and disk that each stage of a study needs: estimates from above, by the terms of `engine/memory.py`."""

import os
import shutil
from collections.abc import Callable
from typing import NamedTuple

from wanda_dvc.engine.checkpoint import ITEMSIZE
from wanda_dvc.engine.memory import ARGUMENTS_BYTES, FIXED, ForwardMemory, ModelSizes, solving_memory, triangles_size
from wanda_dvc.engine.sequences import PREFERRED_CHUNKS
from wanda_dvc.errors import UserError, notice
from wanda_dvc.machine import cores
from wanda_dvc.plan import RECOVERY_LENGTH, WINDOWS_BACK
from wanda_dvc.pruning.gram import WEIGHTS_AT_A_TIME
from wanda_dvc.stages.device import device_name, free_memory_of
from wanda_dvc.study.folder import ITEMS, TEXT, Study

SELECTION = 24  # bytes a weight: its score, the partition of the scores, and the count of ties
TEXT_IN_MEMORY = 32  # bytes for each byte of a text while it is tokenized
BYTES_A_TOKEN = 4  # of English text, about


class Requirements(NamedTuple):
    """What a stage needs at its peak, in bytes."""

    memory: int
    disk: int  # with its outputs


class Run:
    """What the needs of a stage's run follow from: the study, the sizes of the model, dtype, device, free memory."""

    def __init__(self, study: Study, sizes: ModelSizes, free_memory: int = 0) -> None:
        self.study, self.params, self.sizes, self.free_memory = study, study.params, sizes, free_memory
        self.dtype = sizes.dtype if study.params.dtype == "auto" else study.params.dtype
        self.device = device_name(study.params.runtime).partition(":")[0]  # its kind

    def forward(self, length: int) -> ForwardMemory:
        """Return the memory of a forward pass with windows of `length` tokens."""
        return ForwardMemory(self.sizes, dtype=self.dtype, length=length, device=self.device)

    def activations(self, tokens: int) -> int:
        """Return the bytes of the activations of some tokens before a block."""
        return tokens * self.sizes.hidden * ITEMSIZE[self.dtype]

    def data_size(self, name: str, file: str = TEXT) -> int:
        """Return the bytes of a file in `data/`, by default of a text; 0 if it is not fetched, or has no such file."""
        path = self.study.data(name) / file
        return path.stat().st_size if path.is_file() else 0


def requirements(study: Study, stage: str, sizes: ModelSizes, free_memory: int = 0) -> Requirements:
    """Return what a stage needs for a model of these sizes, and for the largest of several texts.

    `recover` trains in the fastest way that fits the free memory; by default, in the way with the least need.
    """
    memory, disk = MEMORY_AND_DISK[stage](Run(study, sizes, free_memory))
    return Requirements(FIXED + memory, disk)


def announce(study: Study, stage: str, sizes: ModelSizes) -> None:
    """Print a stage's needs and what is free to stderr."""
    memory, disk = free(study).values()
    need = requirements(study, stage, sizes, memory)
    needed = f"{gigabytes(need.memory)} of memory and {gigabytes(need.disk)} of disk"
    notice(f"{stage} needs about {needed}; free: {gigabytes(memory)} and {gigabytes(disk)}")


def free(study: Study) -> dict[str, int]:
    """Return the free bytes of memory, the GPU's if stages run there, and of disk."""
    return {"memory": free_memory_of(device_name(study.params.runtime)), "disk": shutil.disk_usage(study.root).free}


def gigabytes(size: int) -> str:
    """Return a number of bytes, readable."""
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{max(size / 1e6, 0.1):.1f} MB"


def lacking_for_solver(study: Study, sizes: ModelSizes) -> list[str]:
    """Return what a recipe with a solver needs and this machine lacks: memory, disk for Gram matrices."""
    needs = {
        # Three blocks in float32, and ten matrices of the widest input.
        "memory": FIXED + 3 * 4 * sizes.block_parameters + 40 * sizes.widest**2,
        "disk": triangles_size(sizes.all_input_squares + sizes.all_output_squares),
    }
    return [
        f"{gigabytes(needs[kind])} of {kind}, {gigabytes(size)} free"
        for kind, size in free(study).items()
        if needs[kind] > size
    ]


def trained_in(dtype: str, device: str) -> str:
    """Return the dtype of the products in `recover`, whose weights are in float32: bfloat16 if the processor has it."""
    from wanda_dvc.engine.accelerator import has_bfloat16

    if has_bfloat16(device):
        return "bfloat16"
    return "float16" if (device, dtype) == ("cuda", "float16") else "float32"


class TrainingWay(NamedTuple):
    """How `recover` trains; the keyword arguments of `train`."""

    low_memory: bool  # weights in bfloat16, moments in 8 bits, logits in slices
    checkpointing: bool  # activations of one block


TRAINING_WAYS = (TrainingWay(False, False), TrainingWay(False, True), TrainingWay(True, True))  # the fastest first


def training_memory(run: Run, way: TrainingWay) -> int:
    """Return the memory of a training step, without fixed costs.

    In float32 are weights, gradients and two moments; the dense model is in the dtype of the products.
    """
    from wanda_dvc.training.compact import BYTES  # imports torch
    from wanda_dvc.training.trainer import LOGITS_OF_SLICE

    length, batch, sizes = min(RECOVERY_LENGTH, run.params.calibration.length), run.params.recovery.batch, run.sizes
    block = 8 * length * sizes.features + 12 * length**2 * sizes.heads_with_scores
    states = (2 if way.low_memory else 4) * length * sizes.hidden * sizes.blocks
    activations = batch * (block + states if way.checkpointing else block * sizes.blocks)
    logits = batch * length * sizes.vocabulary
    if not way.low_memory:
        return (16 + ITEMSIZE[trained_in(run.dtype, run.device)]) * sizes.parameters + activations + 24 * logits
    weights = round((ITEMSIZE["bfloat16"] + BYTES) * sizes.parameters)
    # The head's gradient is a sum over slices; then a slice's logits exist, or its own gradient.
    gradient = ITEMSIZE["bfloat16"] * max(sizes.hidden * sizes.vocabulary, sizes.largest_linear)
    return weights + activations + gradient + max(gradient, 24 * min(logits, LOGITS_OF_SLICE))


def fastest_way(run: Run) -> TrainingWay:
    """Return the fastest way of training that fits the free memory; if none does, the one with the least need."""
    ways = TRAINING_WAYS if os.environ.get("WORLD_SIZE", "1") == "1" else TRAINING_WAYS[:2]  # of `accelerate launch`
    for way in ways:
        if FIXED + training_memory(run, way) <= run.free_memory:
            return way
    return ways[-1]


def choose_training(study: Study, sizes: ModelSizes) -> TrainingWay:
    """Return the fastest way of training that fits the free memory. UserError if none does."""
    run = Run(study, sizes, free(study)["memory"])
    way = fastest_way(run)
    need = FIXED + training_memory(run, way)
    if need > run.free_memory:
        raise UserError(
            f"recovery.tokens: found {gigabytes(run.free_memory)}, expected {gigabytes(need)} of memory; "
            "set it to 0, or free some memory"
        )
    return way


def _needs_of_calibrate(run: Run) -> tuple[int, int]:
    calibration, statistics, sizes = run.params.calibration, run.params.statistics, run.sizes
    forward = run.forward(calibration.length)
    memory = forward.activations + forward.norms + TEXT_IN_MEMORY * run.data_size("calibration")
    disk = 2 * run.activations(calibration.windows * calibration.length)  # before and after a block
    if "gram" in statistics:
        memory += forward.grams
        disk += triangles_size(sizes.all_input_squares)
    if "fisher" in statistics:
        memory = max(memory, forward.backward)
        tokens = min(WINDOWS_BACK, calibration.windows) * calibration.length
        gradients = tokens * sizes.hidden * ITEMSIZE["float32"]
        disk += triangles_size(sizes.all_output_squares)
        disk += (sizes.blocks + 1) * run.activations(tokens) + 2 * gradients
    return forward.weights + memory, disk


def _needs_of_mask(run: Run) -> tuple[int, int]:
    plan, sizes, calibration = run.params.plan, run.sizes, run.params.calibration
    disk = sizes.linear_weights // 8
    if plan.mask_solves:
        memory = solving_memory(sizes, uses_fisher=plan.mask_reads_gradient_grams)
    else:
        scored = sizes.largest_linear  # weights whose scores are in memory; on a CPU, each thread has as many
        if run.device != "cuda":
            if plan.method.selects_by_row(plan.pattern, plan.group):
                scored = min(scored, WEIGHTS_AT_A_TIME)
            scored *= cores()
        memory = sizes.block_parameters + SELECTION * min(scored, sizes.block_parameters)
    memory = max(memory, _trial(run))
    if not plan.propagates and not plan.repairs:
        return memory, disk
    forward = run.forward(calibration.length)
    memory += forward.activations + forward.norms + TEXT_IN_MEMORY * run.data_size("calibration")
    if plan.mask_solves or plan.repairs:
        memory += forward.grams
    models = 2 if plan.corrects else 1  # the dense model runs too, and its inputs are multiplied with the pruned ones
    itemsizes = ITEMSIZE[run.dtype] + sizes.itemsize  # of a pruned block, and of its new weights
    places = 2 * models  # of activations: before and after a block
    if plan.repairs:  # and between all removed blocks
        places = min(sizes.blocks + 1, round(float(plan.sparsity) * sizes.blocks) + 3)
    disk += places * run.activations(calibration.windows * calibration.length)
    if plan.propagates and plan.reconstructs:
        disk += sizes.stored
    return forward.weights + models * memory + sizes.block_parameters * itemsizes, disk


def _needs_of_apply(run: Run) -> tuple[int, int]:
    memory = 9 * run.sizes.largest_linear  # its values, new values and mask
    if "gram" in run.params.statistics:
        memory = solving_memory(run.sizes, uses_fisher=run.params.plan.reconstructor.uses_fisher)
    return max(memory, _trial(run)), run.sizes.stored


def _trial(run: Run) -> int:
    """Return the memory of the trial of a smaller model: a block in float32, and copies of weights that lose parts."""
    sizes = run.sizes
    return 4 * (sizes.other_parameters + 2 * sizes.block_parameters) if run.params.plan.structure else 0


def _needs_of_recover(run: Run) -> tuple[int, int]:
    from wanda_dvc.training.compact import BYTES  # imports torch

    way = fastest_way(run)
    checkpoint = (BYTES if way.low_memory else 12) * run.sizes.parameters  # weights and moments
    return training_memory(run, way), round(3 * checkpoint) + run.sizes.stored


def _needs_of_perplexity(run: Run) -> tuple[int, int]:
    from wanda_dvc.engine import divergence  # imports transformers

    settings, forward = run.params.perplexity, run.forward(run.params.perplexity.length)
    size = max(run.data_size(f"perplexity/{name}") for name in settings.texts)
    tokens = settings.windows * settings.length if isinstance(settings.windows, int) else size // BYTES_A_TOKEN
    compared = min(
        divergence.AT_A_TIME["cuda" if run.device == "cuda" else "cpu"], settings.length * run.sizes.vocabulary
    )
    memory = forward.activations + forward.logits + TEXT_IN_MEMORY * size + divergence.TEMPORARIES * compared
    memory += divergence.REFERENCE_BYTES * max(tokens // PREFERRED_CHUNKS, settings.length)  # of a chunk
    return forward.weights + memory, 2 * run.activations(tokens) + divergence.REFERENCE_BYTES * tokens


def _needs_of_zero_shot(run: Run) -> tuple[int, int]:
    from wanda_dvc.engine.questions import SEQUENCE_TOKENS

    forward = run.forward(SEQUENCE_TOKENS)
    memory = forward.activations + forward.logits + ARGUMENTS_BYTES
    memory = max(memory, 4 * run.sizes.block_parameters)  # a block of each kind is tried in float32
    size = sum(run.data_size(f"tasks/{name}", ITEMS) for name in run.params.tasks.names)
    return forward.weights + memory, 2 * run.activations(size // BYTES_A_TOKEN)


MEMORY_AND_DISK: dict[str, Callable[[Run], tuple[int, int]]] = {
    "calibrate": _needs_of_calibrate,
    "mask": _needs_of_mask,
    "apply": _needs_of_apply,
    "recover": _needs_of_recover,
    "perplexity": _needs_of_perplexity,
    "zero-shot": _needs_of_zero_shot,
}
