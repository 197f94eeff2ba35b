"""The memory and disk that stages with a model need: estimates from above, by the terms of `engine/memory.py`."""

import math
import shutil
from collections.abc import Callable
from typing import NamedTuple

from wanda_dvc.engine import accelerator, divergence
from wanda_dvc.engine.checkpoint import ITEMSIZE
from wanda_dvc.engine.memory import (
    ARGUMENTS_BYTES,
    COMPACT_BYTES,
    FIXED,
    LOGITS_OF_SLICE,
    ForwardMemory,
    ModelSizes,
    solving_memory,
    triangles_size,
)
from wanda_dvc.engine.questions import SEQUENCE_TOKENS
from wanda_dvc.engine.sequences import PREFERRED_CHUNKS
from wanda_dvc.errors import UserError, notice
from wanda_dvc.plan import RECOVERY_LENGTH, TOKENS_OF_CHOICES
from wanda_dvc.reading import is_there
from wanda_dvc.stages.device import device_name, free_memory_of
from wanda_dvc.study.artifact import PROVENANCE
from wanda_dvc.study.folder import ITEMS, TEXT, Study

TEXT_IN_MEMORY = 32  # bytes for each byte of a text while it is tokenized
WINDOWS_TOKEN = 8  # bytes of a token of training windows
ITEMS_IN_MEMORY = 64  # bytes for each byte of the items of tasks, with the copies of lm-eval; about
BYTES_A_TOKEN = 4  # of English text, about


class Requirements(NamedTuple):
    """What a stage needs at its peak, in bytes."""

    memory: int
    disk: int  # with its outputs


class TrainingWay(NamedTuple):
    """How `recover` trains; the keyword arguments of `train`."""

    low_memory: bool  # weights in bfloat16, moments in 8 bits, logits in slices
    checkpointing: bool  # activations of one block


TRAINING_WAYS = (TrainingWay(False, False), TrainingWay(False, True), TrainingWay(True, True))  # the fastest first


class Conditions:
    """What a stage's needs follow from: the study, the sizes of the model, dtype, device and free memory.

    `recover` trains in the fastest way that fits; with 0 free bytes, in the one with the least need.
    """

    def __init__(self, study: Study, sizes: ModelSizes, free_memory: int = 0) -> None:
        self.study, self.params, self.sizes, self.free_memory = study, study.params, sizes, free_memory
        self.dtype = sizes.dtype if study.params.dtype == "auto" else study.params.dtype
        self.device = device_name(study.params.runtime).partition(":")[0]  # its kind

    def forward(self, length: int) -> ForwardMemory:
        """Return the memory of a forward pass with windows of `length` tokens."""
        return ForwardMemory(self.sizes, dtype=self.dtype, length=length, device=self.device)

    def predictions(self, length: int) -> int:
        """Return the memory to compare a window's predictions with the dense model's."""
        at_a_time = divergence.AT_A_TIME["cuda" if self.device == "cuda" else "cpu"]
        compared = min(at_a_time, length * self.sizes.vocabulary)
        return self.forward(length).logits + divergence.TEMPORARIES * compared

    def stored_activations(self, tokens: int) -> int:
        """Return the bytes on disk of the activations of some tokens before a block."""
        return tokens * self.sizes.hidden * ITEMSIZE[self.dtype]

    def data_size(self, name: str, file: str = TEXT) -> int:
        """Return the bytes of the largest such file in a folder of `data/`, by default of a text; 0 without one."""
        return max((path.stat().st_size for path in self.study.data(name).rglob(file)), default=0)


def requirements(study: Study, stage: str, sizes: ModelSizes, free_memory: int = 0) -> Requirements:
    """Return what a stage needs for a model of these sizes. Of several texts, one is in memory: the largest counts."""
    memory, disk = MEMORY_AND_DISK[stage](Conditions(study, sizes, free_memory))
    return Requirements(FIXED + memory, disk)


def announce(study: Study, stage: str, sizes: ModelSizes) -> None:
    """Print a stage's needs and what is free to stderr."""
    memory, disk = free(study).values()
    need = requirements(study, stage, sizes, memory)
    needed = f"{gigabytes(need.memory)} of memory and {gigabytes(need.disk)} of disk"
    notice(f"{stage} needs about {needed}; free: {gigabytes(memory)} and {gigabytes(disk)}")


def free(study: Study) -> dict[str, int]:
    """Return the free bytes of memory, the GPU's if stages run there, and of disk."""
    folder = next(folder for folder in (study.root, *study.root.parents) if folder.is_dir())  # of a new study
    return {"memory": free_memory_of(device_name(study.params.runtime)), "disk": shutil.disk_usage(folder).free}


def gigabytes(size: int) -> str:
    """Return a number of bytes, readable."""
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{max(size / 1e6, 0.1):.1f} MB"


def solver_requirements(study: Study, sizes: ModelSizes) -> Requirements | None:
    """Return what the settings' solver needs, with Gram matrices that are still to measure; None without a solver."""
    plan = study.params.plan
    if plan.tier == "norms" and not plan.mask_solves:
        return None
    squares = 0  # elements of Gram matrices to store; with propagation `mask` has those of one block, and stores none
    if "gram" in study.params.statistics and not is_there(study.gram / PROVENANCE):
        squares += sizes.all_input_squares
    if "fisher" in study.params.statistics and not is_there(study.fisher / PROVENANCE):
        squares += sizes.all_output_squares
    memory = FIXED + solving_memory(sizes, uses_fisher=plan.used_reconstruction.uses_fisher)
    if squares:
        memory = max(memory, requirements(study, "calibrate", sizes).memory)
    return Requirements(memory, triangles_size(squares))


def check_solver(study: Study, sizes: ModelSizes) -> None:
    """Raise UserError if this machine lacks the memory or disk that the settings' recipe needs to solve."""
    needs, (memory, disk) = solver_requirements(study, sizes), free(study).values()
    if needs and (needs.memory > memory or needs.disk > disk):
        available = f"{gigabytes(memory)} of memory and {gigabytes(disk)} of disk"
        needed = f"{gigabytes(needs.memory)} and {gigabytes(needs.disk)}"
        problem = f"{study.params.recipe}: found {available}, expected {needed}"
        raise UserError(f"recipe: {problem}; free some, or use `--recipe wanda`, which needs less")


def training_dtype(dtype: str, device: str) -> str:
    """Return the dtype of the products in `recover`, whose weights are in float32: bfloat16 if the processor has it."""
    if accelerator.has_bfloat16(device):
        return "bfloat16"
    return "float16" if (device, dtype) == ("cuda", "float16") else "float32"


def training_memory(given: Conditions, way: TrainingWay) -> int:
    """Return the memory of a training step in one process, without fixed costs."""
    from wanda_dvc.training.sharding import launched_processes

    processes = launched_processes()
    length, sizes = min(RECOVERY_LENGTH, given.params.calibration.length), given.sizes
    batch = math.ceil(given.params.recovery.batch / processes)
    # Bytes: of a stored number, of a weight of the dense model, and of a trained weight with gradient and moments.
    if way.low_memory:  # a gradient is freed as soon as it is used
        stored, itemsize, states = 2, 2, COMPACT_BYTES
    else:
        stored, itemsize, states = 4, ITEMSIZE[training_dtype(given.dtype, given.device)], 16
    # Features and their gradients; attention's scores, their softmax and its gradient.
    activations = 4 * (2 * length * sizes.features + 3 * length**2 * sizes.heads_with_scores)
    if way.checkpointing:
        activations += stored * length * sizes.hidden * sizes.blocks
    else:
        activations *= sizes.blocks
    weights = round((states + itemsize) * sizes.parameters)
    if processes > 1:  # one block, the next one, embeddings and head are gathered, and their gradients added up
        gathered = 2 * sizes.block_parameters + sizes.other_parameters
        weights = weights // processes + (2 * stored + itemsize) * gathered
    # In float32: logits and log-softmax of both models, the divergence, a gradient.
    logits = 24 * batch * length * sizes.vocabulary
    if way.low_memory:  # the head's gradient is a sum over slices; then a slice's logits exist, or its own gradient
        gradient = 2 * max(sizes.hidden * sizes.vocabulary, sizes.largest_linear)
        logits = gradient + max(gradient, min(logits, 24 * LOGITS_OF_SLICE))
    return weights + batch * activations + logits + WINDOWS_TOKEN * given.params.recovery.tokens


def fitting_ways(given: Conditions) -> list[TrainingWay]:
    """Return the ways of training that fit the free memory, the fastest first."""
    return [way for way in TRAINING_WAYS if FIXED + training_memory(given, way) <= given.free_memory]


def training_ways(study: Study, sizes: ModelSizes) -> list[TrainingWay]:
    """Return the ways of training that fit the free memory, the fastest first. UserError if none fits."""
    given = Conditions(study, sizes, free(study)["memory"])
    ways = fitting_ways(given)
    if not ways:
        need = FIXED + training_memory(given, TRAINING_WAYS[-1])
        problem = f"found {gigabytes(given.free_memory)}, expected {gigabytes(need)} of memory"
        raise UserError(f"recovery.tokens: {problem}; set it to 0, or free some memory")
    return ways


def _needs_of_calibrate(given: Conditions) -> tuple[int, int]:
    calibration, statistics, sizes = given.params.calibration, given.params.statistics, given.sizes
    forward = given.forward(calibration.length)
    memory = forward.activations + forward.norms + TEXT_IN_MEMORY * given.data_size("calibration")
    disk = 2 * given.stored_activations(calibration.windows * calibration.length)  # before and after a block
    if "gram" in statistics:
        memory += forward.grams
        disk += triangles_size(sizes.all_input_squares)
    if "fisher" in statistics:
        memory = max(memory, forward.backward)
        tokens = calibration.windows_back * calibration.length
        gradients = tokens * sizes.hidden * ITEMSIZE["float32"]
        disk += triangles_size(sizes.all_output_squares)
        disk += (sizes.blocks + 1) * given.stored_activations(tokens) + 2 * gradients
    if given.params.plan.measures_blocks:  # each choice has activations of its own
        tokens = TOKENS_OF_CHOICES + calibration.length * len(calibration.shares)
        memory = max(memory, forward.activations + given.predictions(calibration.length))
        disk += 2 * sizes.blocks * given.stored_activations(tokens)
    return forward.weights + memory, disk


def _needs_of_recover(given: Conditions) -> tuple[int, int]:
    way = (*fitting_ways(given), TRAINING_WAYS[-1])[0]
    checkpoint = (COMPACT_BYTES if way.low_memory else 12) * given.sizes.parameters  # weights and moments
    text = TEXT_IN_MEMORY * given.data_size("recovery" if given.params.recovery.text else "calibration")
    # Windows are cut before the training. On disk are the best checkpoint, the last one and the one being written.
    text += 3 * WINDOWS_TOKEN * given.params.recovery.tokens  # as they are drawn, of all texts, and in order
    return max(text, training_memory(given, way)), round(3 * checkpoint) + given.sizes.stored


def _needs_of_perplexity(given: Conditions) -> tuple[int, int]:
    settings, forward = given.params.perplexity, given.forward(given.params.perplexity.length)
    size = max(given.data_size(f"perplexity/{name}") for name in settings.texts)
    tokens = settings.windows * settings.length if isinstance(settings.windows, int) else size // BYTES_A_TOKEN
    memory = forward.activations + given.predictions(settings.length) + TEXT_IN_MEMORY * size
    memory += divergence.REFERENCE_BYTES * max(tokens // PREFERRED_CHUNKS, settings.length)  # of a chunk
    return forward.weights + memory, 2 * given.stored_activations(tokens) + divergence.REFERENCE_BYTES * tokens


def _needs_of_zero_shot(given: Conditions) -> tuple[int, int]:
    forward = given.forward(SEQUENCE_TOKENS)
    size = sum(given.data_size(f"tasks/{name}", ITEMS) for name in given.params.tasks.names)
    memory = forward.activations + forward.logits + ARGUMENTS_BYTES + ITEMS_IN_MEMORY * size
    memory = max(memory, 4 * given.sizes.block_parameters)  # a block of each kind is tried in float32
    return forward.weights + memory, 2 * given.stored_activations(size // BYTES_A_TOKEN)


MEMORY_AND_DISK: dict[str, Callable[[Conditions], tuple[int, int]]] = {
    "calibrate": _needs_of_calibrate,
    "recover": _needs_of_recover,
    "perplexity": _needs_of_perplexity,
    "zero-shot": _needs_of_zero_shot,
}
