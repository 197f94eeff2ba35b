"""The repair for neighbouring blocks that are removed: the last linear before them takes over a part of what they add.

ReplaceMe (arXiv 2505.02819) multiplies this linear's outputs by a matrix. A new weight W + D can do more, as it has
more columns: D is least squares from the linear's input to the difference of the hidden states. No parameter is added.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.linalg import vector_norm

from wanda_dvc.engine.activations import ActivationStore
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.forward import BlockRun, ModelRunner, run_batches
from wanda_dvc.engine.load import WeightChange
from wanda_dvc.engine.record import InputRecorder
from wanda_dvc.engine.sequences import Chunk, Hidden
from wanda_dvc.engine.sums import InputSums
from wanda_dvc.errors import UserError
from wanda_dvc.kernels import multiply
from wanda_dvc.pruning.reconstruction import oriented
from wanda_dvc.pruning.solvers import GramFactors

VALIDATION_STRIDE = 4  # the dampings are tried on every fourth chunk
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


class RemovedBlocks(NamedTuple):
    """The blocks between two others, and the activations before all blocks up to the second one."""

    block_before: int
    linear: str  # of the block before, which takes over a part of what they add
    end: int  # the first block after them
    store: ActivationStore


def repair(
    runner: ModelRunner, linear: str, weight: Tensor, *, block: int, end: int
) -> tuple[Tensor, dict[str, float]]:
    """Return the new weight of a block's last linear, as stored, if the blocks after it and before `end` are removed.

    A forward pass up to `end` has stored the activations. The damping is that of the least error on the validation
    chunks; all chunks give the weight. Diagnostics are the damping, and the error divided by that without a repair.
    UserError if no damping lowers the error, which a norm after the linear may prevent.
    """
    transposed = runner.decoder.linears(block)[linear].transposed
    if weight.shape[1 if transposed else 0] != runner.store.width:  # JetMoE: all else is experts
        raise UserError(f"reconstruction: {linear} adds nothing to the hidden states; set recipe=wanda")
    removed = RemovedBlocks(block, linear, end, runner.store)
    validation = runner.chunks[::VALIDATION_STRIDE]
    fitting = [chunk for chunk in runner.chunks if chunk.number % VALIDATION_STRIDE] or validation  # of a single chunk
    sums = runner.merge(run_before, removed, fitting, InputSums(), "repair, chunk")

    weights = [new_weight(weight, sums, linear, damping, transposed=transposed) for damping in DAMPINGS]
    changes = [WeightChange({}, {linear: changed}) for changed in weights]
    squares = list(runner.map(run_changed, (removed, changes), validation, "repair, chunk"))
    totals = torch.stack(squares).sum(dim=0)
    unrepaired, *errors = totals.sqrt().nan_to_num(torch.inf, torch.inf).tolist()  # of an overflow: NaN
    error, damping = min(zip(errors, DAMPINGS, strict=True))
    if not error < unrepaired:
        raise UserError(
            f"reconstruction: {linear} cannot take over the outputs of blocks {block + 1} to {end - 1}: the error on "
            f"held-out windows is {error:.4g}, expected less than {unrepaired:.4g}, the error without a change; set "
            "recipe=wanda"
        )
    if fitting is not validation:
        sums.merge(runner.merge(run_before, removed, validation, InputSums(), "repair, chunk"))
    repaired = new_weight(weight, sums, linear, damping, transposed=transposed)
    return repaired, {"damping": damping, "held_out": error / unrepaired}


def new_weight(weight: Tensor, sums: InputSums, linear: str, damping: float, *, transposed: bool) -> Tensor:
    """Return W + D, as stored: D = RᵀX (G + λI)⁻¹."""
    root, _ = GramFactors(sums.grams[linear].matrix(), damping=damping).inverse_root  # rootᵀ root = (G + λI)⁻¹
    difference = multiply(multiply(sums.crosses[linear].sum.float(), root.T), root)
    return (weight.float() + oriented(difference, transposed).to(weight.device)).to(weight.dtype).contiguous()


@torch.no_grad()
def run_before(model: Decoder, removed: RemovedBlocks, chunk: Chunk) -> InputSums:
    """Return a chunk's G = XᵀX and RᵀX: X is the linear's input, R what the removed blocks add to the hidden states."""
    block, linear = removed.block_before, removed.linear
    model.load(block, -1)
    recorder = InputRecorder(linears={linear: model.linears(block)[linear]}, gram=True)
    batches = model.batches(chunk.sequences, streamed=not removed.store.on_device)
    before, after, wanted = (
        removed.store.read_batches(index, chunk.number, batches, model.copies)
        for index in (block, block + 1, removed.end)
    )
    with recorder.recording():
        for batch, states_before, states_after, states_wanted in zip(batches, before, after, wanted, strict=True):
            recorder.left_factors[linear] = (states_wanted.float() - states_after.float()).flatten(0, 1)
            model.run(block, states_before, batch[0])
            recorder.end_batch()
    return recorder.sums


@torch.no_grad()
def run_changed(
    model: Decoder, job: tuple[RemovedBlocks, Sequence[WeightChange]], chunk: Chunk
) -> Float[Tensor, " changes"]:
    """Return ‖block's outputs − hidden states before `end`‖² of a chunk: without a change, then with each change."""
    removed, changes = job
    block = BlockRun(removed.block_before, removed.store)
    wanted = removed.store.read(removed.end, chunk.number)
    errors = [squared_error(removed.store.read(removed.block_before + 1, chunk.number), wanted)]
    for change in changes:
        model.load(removed.block_before, -1, change)
        outputs = itertools.chain.from_iterable(run_batches(model, block, chunk, []))
        errors.append(squared_error(outputs, wanted))
    return torch.tensor(errors, dtype=torch.float64)


def squared_error(outputs: Iterable[Tensor], wanted: Hidden) -> float:
    """Return ‖outputs − wanted‖² over some sequences."""
    error = 0.0
    for output, states in zip(outputs, wanted, strict=True):
        error += vector_norm(output.cpu().float() - states.cpu().float()).item() ** 2
    return error
