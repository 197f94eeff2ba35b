"""The memory and disk that each stage needs: of `mask` and `apply` here, for tests and tables; else as stages say it.

Both read a block or a linear at a time, so a machine on which the other stages run has the memory.
"""

from wanda_dvc.engine.checkpoint import ITEMSIZE
from wanda_dvc.engine.memory import FIXED, ModelSizes, solving_memory
from wanda_dvc.machine import cores
from wanda_dvc.pruning.gram import WEIGHTS_AT_A_TIME
from wanda_dvc.stages import needs
from wanda_dvc.stages.needs import TEXT_IN_MEMORY, Conditions, Requirements
from wanda_dvc.study.folder import Study

SELECTION = 24  # bytes a weight: its score, the partition of the scores, and the count of ties


def requirements(study: Study, stage: str, sizes: ModelSizes) -> Requirements:
    """Return what a stage needs for a model of these sizes, and for the largest of several texts."""
    if stage not in ("mask", "apply"):
        return needs.requirements(study, stage, sizes)
    memory, disk = (of_mask if stage == "mask" else of_apply)(Conditions(study, sizes))
    return Requirements(FIXED + memory, disk)


def of_mask(given: Conditions) -> tuple[int, int]:
    """Return the bytes of memory, without fixed costs, and of disk."""
    plan, sizes, calibration = given.params.plan, given.sizes, given.params.calibration
    disk = sizes.linear_weights // 8
    if plan.mask_solves:
        memory = solving_memory(sizes, uses_fisher=plan.propagates and plan.used_reconstruction.uses_fisher)
    else:
        scored = sizes.largest_linear  # weights whose scores are in memory; on a CPU, each thread has as many
        if given.device != "cuda":
            if plan.method.selects_by_row(plan.pattern, plan.group):
                scored = min(scored, WEIGHTS_AT_A_TIME)
            scored *= cores()
        memory = sizes.block_parameters + SELECTION * min(scored, sizes.block_parameters)
    memory = max(memory, _trial(given))
    if not plan.propagates and not plan.repairs:
        return memory, disk
    forward = given.forward(calibration.length)
    memory += forward.activations + forward.norms + TEXT_IN_MEMORY * given.data_size("calibration")
    if plan.mask_solves or plan.repairs:
        memory += forward.grams
    itemsizes = ITEMSIZE[given.dtype] + sizes.itemsize  # of a pruned block, and of its new weights
    places = 2  # of activations: before and after a block
    if plan.repairs:  # of both models, from the block before removed ones to their end, and after the next block
        places = 2 * min(sizes.blocks + 1, round(float(plan.sparsity) * sizes.blocks) + 2)
    disk += places * given.stored_activations(calibration.windows * calibration.length)
    if plan.propagates and plan.reconstructs:
        disk += sizes.stored
    return forward.weights + memory + sizes.block_parameters * itemsizes, disk


def of_apply(given: Conditions) -> tuple[int, int]:
    """Return the bytes of memory, without fixed costs, and of disk."""
    memory = 9 * given.sizes.largest_linear  # its values, new values and mask
    plan = given.params.plan
    if plan.apply_reconstructs:
        memory = solving_memory(given.sizes, uses_fisher=plan.used_reconstruction.uses_fisher)
    return max(memory, _trial(given)), given.sizes.stored


def _trial(given: Conditions) -> int:
    """Return the memory of the trial of a smaller model: a block in float32, and copies of weights that lose parts."""
    sizes = given.sizes
    return 4 * (sizes.other_parameters + 2 * sizes.block_parameters) if given.params.plan.structure else 0
