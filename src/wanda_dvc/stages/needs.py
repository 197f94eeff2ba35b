"""The memory and disk that each stage of a study needs: estimates from above, by the terms of `engine/memory.py`.

A text that is not fetched yet counts as empty.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass

from wanda_dvc.engine.checkpoint import ITEMSIZE, dtype_of
from wanda_dvc.engine.memory import FIXED, ForwardMemory, ModelSizes, solving_memory, triangles_size
from wanda_dvc.engine.sequences import PREFERRED_CHUNKS
from wanda_dvc.errors import UserError, notice
from wanda_dvc.machine import cores
from wanda_dvc.plan import RECOVERY_BATCH, RECOVERY_LENGTH, WINDOWS_BACK
from wanda_dvc.pruning.gram import WEIGHTS_AT_A_TIME
from wanda_dvc.stages import MODELS
from wanda_dvc.stages.device import device_name, free_memory_of
from wanda_dvc.study.folder import ITEMS, TEXT, Study

SELECTION = 24  # bytes a weight: its score, the partition of the scores, and the count of ties
TEXT_IN_MEMORY = 32  # bytes for each byte of a text while it is tokenized
BYTES_A_TOKEN = 4  # of English text, about


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """What a stage needs at its peak, in bytes."""

    memory: int
    disk: int  # with its outputs


class Run:
    """What the needs of a stage's run follow from: settings, the sizes of the model, dtype, device, texts."""

    def __init__(self, study: Study, model: str = "", text: str = "", sizes: ModelSizes | None = None) -> None:
        """Without a model or text: the one that needs most. UserError without a config.json."""
        self.study, self.params, self.text = study, study.params, text
        self.model = model if model in MODELS else "dense"  # else another variant, such as `norms`
        folder = study.model(self.model)
        self.sizes = sizes or ModelSizes.read(folder)
        self.dtype = dtype_of(folder, study.params.dtype)
        self.device = device_name(study.params.runtime).partition(":")[0]  # its kind

    def forward(self, length: int) -> ForwardMemory:
        """Return the memory of a forward pass with windows of `length` tokens."""
        return ForwardMemory(self.sizes, dtype=self.dtype, length=length)

    def activations(self, tokens: int) -> int:
        """Return the bytes of the activations of some tokens before a block."""
        return tokens * self.sizes.hidden * ITEMSIZE[self.dtype]

    def model_size(self) -> int:
        """Return the bytes of the model's directory."""
        return sum(path.stat().st_size for path in self.study.model(self.model).iterdir() if path.is_file())

    def data_size(self, name: str, file: str = TEXT) -> int:
        """Return the bytes of a file in `data/`, by default of a text; 0 if it is not fetched, or has no such file."""
        path = self.study.data(name) / file
        return path.stat().st_size if path.is_file() else 0


def requirements(
    study: Study, stage: str, model: str = "", text: str = "", sizes: ModelSizes | None = None
) -> Requirements:
    """Return what a stage of a study needs, as `Run`; with the sizes of its model, if they are known already."""
    return REQUIREMENTS[stage](Run(study, model, text, sizes))


def announce(study: Study, stage: str, model: str = "", text: str = "", *, sizes: ModelSizes) -> None:
    """Print a stage's needs and what is free to stderr."""
    need = requirements(study, stage, model, text, sizes)
    free_sizes = " and ".join(gigabytes(size) for size in free(study).values())
    notice(
        f"{stage} needs about {gigabytes(need.memory)} of memory and {gigabytes(need.disk)} of disk; free: {free_sizes}"
    )


def free(study: Study) -> dict[str, int]:
    """Return the free bytes of memory, the GPU's if stages run there, and of disk."""
    return {"memory": free_memory_of(device_name(study.params.runtime)), "disk": shutil.disk_usage(study.root).free}


def gigabytes(size: int) -> str:
    """Return a number of bytes, readable."""
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{max(size / 1e6, 0.1):.1f} MB"


def lacking_for_solver(study: Study, sizes: ModelSizes) -> list[str]:
    """Return what a recipe with a solver needs and this machine lacks: memory, disk for Gram matrices.

    Memory: three blocks in float32, and ten matrices of the widest input.
    """
    needs = {
        "memory": FIXED + 3 * 4 * sizes.block_parameters + 40 * sizes.widest**2,
        "disk": triangles_size(sizes.all_input_squares + sizes.all_output_squares),
    }
    lacking = []
    for kind, size_free in free(study).items():
        if needs[kind] > size_free:
            lacking.append(f"{gigabytes(needs[kind])} of {kind}, {gigabytes(size_free)} free")
    return lacking


def trained_in(dtype: str, device: str) -> str:
    """Return the dtype of the products in `recover`, whose weights are in float32: bfloat16 if the processor has it."""
    from wanda_dvc.engine.accelerator import has_bfloat16

    if has_bfloat16(device):
        return "bfloat16"
    return "float16" if (device, dtype) == ("cuda", "float16") else "float32"


def training(run: Run, *, kept: bool = False) -> int:
    """Return the memory of a training step; activations are those of one block and all inputs, or, if `kept`, all.

    Weights, gradients and two moments are in float32; the dense model is in the dtype of the products.
    """
    length, sizes = min(RECOVERY_LENGTH, run.params.calibration.length), run.sizes
    block = 8 * length * sizes.features + 12 * length**2 * sizes.heads_with_scores
    activations = block * sizes.blocks if kept else block + 4 * length * sizes.hidden * sizes.blocks
    predictions = 24 * length * sizes.vocabulary
    weights = (16 + ITEMSIZE[trained_in(run.dtype, run.device)]) * sizes.parameters
    return FIXED + weights + RECOVERY_BATCH * (activations + predictions)


def needs_checkpointing(study: Study, sizes: ModelSizes) -> bool:
    """Whether `recover` needs gradient checkpointing. UserError if the memory is too small even with it."""
    run = Run(study, sizes=sizes)
    least, most, size_free = training(run), training(run, kept=True), free(study)["memory"]
    if least > size_free:
        raise UserError(
            f"recovery.tokens: found {gigabytes(size_free)}, expected {gigabytes(least)} of memory (16 bytes a "
            "parameter, the dense model and activations); set it to 0, or free some memory"
        )
    return most > size_free


def _needs_of_calibrate(run: Run) -> Requirements:
    """Estimate a forward pass over all windows; for the statistics `fisher`, a backward pass over some of them too."""
    calibration, statistics = run.params.calibration, run.params.statistics
    forward = run.forward(calibration.length)
    memory = forward.activations + forward.norms + TEXT_IN_MEMORY * run.data_size("calibration")
    disk = 2 * run.activations(calibration.windows * calibration.length)  # before and after a block
    if "gram" in statistics:
        memory += forward.grams
        disk += triangles_size(run.sizes.all_input_squares)
    if "fisher" in statistics:
        memory = max(memory, forward.backward)
        tokens = min(WINDOWS_BACK, calibration.windows) * calibration.length
        disk += triangles_size(run.sizes.all_output_squares)
        disk += (run.sizes.blocks + 1) * run.activations(tokens) + 2 * tokens * run.sizes.hidden * ITEMSIZE["float32"]
    return Requirements(memory=FIXED + forward.weights + memory, disk=disk)


def _needs_of_mask(run: Run) -> Requirements:
    """Estimate scores or a solver for a block; with `propagation`, while windows run through the pruned blocks."""
    plan, sizes, calibration = run.params.plan, run.sizes, run.params.calibration
    disk = sizes.linear_weights // 8
    if plan.solves_by_input:
        memory = solving_memory(sizes, uses_fisher=plan.mask_reads_gradient_grams)
    else:
        at_a_time = sizes.largest_linear  # weights whose scores are in memory; on a CPU, each thread has as many
        if run.device != "cuda":
            if plan.method.selects_by_row(plan.pattern, plan.group):
                at_a_time = min(at_a_time, WEIGHTS_AT_A_TIME)
            at_a_time *= cores()
        memory = sizes.block_weights + SELECTION * min(at_a_time, sizes.block_weights)
    memory = max(memory, _trial(run))
    if not plan.propagates and not plan.repairs:
        return Requirements(memory=FIXED + memory, disk=disk)
    forward = run.forward(calibration.length)
    memory += forward.activations + forward.norms + TEXT_IN_MEMORY * run.data_size("calibration")
    if plan.solves_by_input or plan.repairs:
        memory += forward.grams
    models = 2 if plan.corrects else 1  # the dense model runs too, and its inputs are multiplied with the pruned ones
    itemsizes = ITEMSIZE[run.dtype] + sizes.itemsize  # of a pruned block, and of its new weights
    memory = models * memory + sizes.block_parameters * itemsizes
    places = 2 * models  # of activations: before and after a block
    if plan.repairs:  # and between all removed blocks
        places = min(sizes.blocks + 1, round(float(plan.sparsity) * sizes.blocks) + 3)
    disk += places * run.activations(calibration.windows * calibration.length)
    if plan.propagates and plan.solves:
        disk += run.model_size()
    return Requirements(memory=FIXED + forward.weights + memory, disk=disk)


def _needs_of_apply(run: Run) -> Requirements:
    """Estimate a linear, or a solver, while the linear before it is written; and the files of another model."""
    memory = 9 * run.sizes.largest_linear
    if "gram" in run.params.statistics:
        memory = solving_memory(run.sizes, uses_fisher=run.params.plan.reconstructor.uses_fisher)
    return Requirements(memory=FIXED + max(memory, _trial(run)), disk=run.model_size())


def _needs_of_perplexity(run: Run) -> Requirements:
    """Estimate the windows of one text, or of the largest; the dense model's predictions on all of them are stored."""
    from wanda_dvc.engine import divergence  # imports transformers

    settings, forward = run.params.perplexity, run.forward(run.params.perplexity.length)
    texts = [run.text] if run.text else list(settings.texts)
    size = max(run.data_size(f"perplexity/{name}") for name in texts)
    tokens = size // BYTES_A_TOKEN
    if isinstance(settings.windows, int):
        asked = settings.windows * settings.length
        tokens = min(tokens, asked) if size else asked
    compared = min(
        divergence.AT_A_TIME["cuda" if run.device == "cuda" else "cpu"], settings.length * run.sizes.vocabulary
    )
    memory = forward.activations + forward.logits + TEXT_IN_MEMORY * size + divergence.TEMPORARIES * compared
    memory += divergence.REFERENCE_BYTES * max(tokens // PREFERRED_CHUNKS, settings.length)  # of a chunk
    disk = 2 * run.activations(tokens)
    if run.model == "dense":  # the other models read them
        disk += divergence.REFERENCE_BYTES * tokens
    return Requirements(memory=FIXED + forward.weights + memory, disk=disk)


def _needs_of_zero_shot(run: Run) -> Requirements:
    """Estimate packed questions; their tokens at most, because a file of items also has what no model reads."""
    from wanda_dvc.engine.decoder import ARGUMENTS_BYTES  # imports transformers
    from wanda_dvc.engine.questions import SEQUENCE_TOKENS

    forward = run.forward(SEQUENCE_TOKENS)
    memory = forward.activations + forward.logits + ARGUMENTS_BYTES[run.device]
    memory = max(
        memory, 4 * run.sizes.block_parameters
    )  # before the questions, a block of each kind is tried in float32
    size = sum(run.data_size(f"tasks/{name}", ITEMS) for name in run.params.tasks.names)
    return Requirements(memory=FIXED + forward.weights + memory, disk=2 * run.activations(size // BYTES_A_TOKEN))


def _trial(run: Run) -> int:
    """Return the memory of the trial of a smaller model: a block in float32, and copies of weights that lose parts."""
    if run.params.plan.structure is None:
        return 0
    return 4 * (run.sizes.other_parameters + run.sizes.block_parameters + run.sizes.block_parameters // 3)


REQUIREMENTS: dict[str, Callable[[Run], Requirements]] = {
    "calibrate": _needs_of_calibrate,
    "mask": _needs_of_mask,
    "apply": _needs_of_apply,
    # Three checkpoints of the training, and the files of another model.
    "recover": lambda run: Requirements(memory=training(run), disk=36 * run.sizes.parameters + run.model_size()),
    "perplexity": _needs_of_perplexity,
    "zero-shot": _needs_of_zero_shot,
}
