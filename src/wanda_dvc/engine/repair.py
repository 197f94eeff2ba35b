"""The repair for removed blocks: linears of the blocks that stay take over a part of what the removed blocks add.

ReplaceMe (arXiv 2505.02819) multiplies the outputs of the last linear before them by a matrix. A new weight W + D can
do more, as it has more columns: D is least squares from the linear's input to what the hidden states lack. No parameter
is added. Then the last linear of each later block lowers what is left, in the model with the new weights before it.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.linalg import vector_norm

from wanda_dvc.engine.activations import ActivationStore
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.forward import BlockRun, ModelInput, ModelRunner, in_smaller_batches, run_batches, run_block
from wanda_dvc.engine.load import WeightChange
from wanda_dvc.engine.record import observing
from wanda_dvc.engine.sequences import Chunk, Hidden
from wanda_dvc.engine.sums import InputSums, RepairSums
from wanda_dvc.errors import FIX_NOT_FINITE, UserError, notice
from wanda_dvc.kernels import multiply
from wanda_dvc.pruning.reconstruction import oriented
from wanda_dvc.pruning.solvers import GramFactors

VALIDATION_STRIDE = 4  # the dampings are tried on every fourth chunk
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


class Refit(NamedTuple):
    """A linear that gets a new weight, and the blocks until the hidden states are compared with the dense model's."""

    block: int  # of the linear
    end: int  # the next block that stays, or the number of blocks; those between are removed
    linear: str


class RefitRun(NamedTuple):
    """A refit, and the activations before all blocks from its own to its end."""

    refit: Refit
    store: ActivationStore  # of the model with the earlier new weights, without the removed blocks
    dense_store: ActivationStore


def run_refits(
    runner: ModelRunner, windows: ModelInput, refits: Sequence[Refit], refit: Callable[[RefitRun], Tensor | None]
) -> Iterator[int]:
    """Run windows through the dense model, and without the removed blocks; yield the number of each finished block.

    `refits` are those of the block before the first removed one, and of each later block that stays. `refit` returns a
    linear's new weight; None: it stays as it is. It must keep the weight on disk first: a resumed run asks again, and
    the activations are then those with the new weight. UserError for activations that are not finite.
    """
    refit_of = {job.end - 1: job for job in refits}  # by the last block before its end
    # `refit` reads the activations before each block from its own to `end`, one more than `kept`: the oldest ones are
    # dropped only once the last block before `end` counts as finished.
    kept = max(job.end - job.block for job in refits)
    for step in runner.forward(windows, models=["own", "dense"], kept=kept):
        block, (store, dense) = step.index, runner.stores
        run_windows(runner, BlockRun(block, dense))
        if block <= refits[0].block:  # both models are equal so far
            store.copy_from(dense, block + 1, block + 1)
        elif any(job.block == block for job in refits):
            run_windows(runner, BlockRun(block, store))
        else:
            store.copy_from(store, block, block + 1)
        job = refit_of.get(block)
        if job is not None and (weight := refit(RefitRun(job, store, dense))) is not None:
            change = WeightChange({}, {job.linear: weight})
            run_windows(runner, BlockRun(job.block, store, change=change))
            for removed in range(job.block + 1, job.end):
                store.copy_from(store, removed, removed + 1)
        yield block


def run_windows(runner: ModelRunner, block: BlockRun) -> None:
    """Run all windows through a block. UserError for activations that are not finite: no sums of them are valid."""
    total = runner.merge(run_block, block, runner.chunks, InputSums(), f"block {block.index}, chunk")
    if not total.is_finite:
        where = f"{runner.decoder.checkpoint}: block {block.index}, run for the repair"
        raise UserError(f"{where}: activations that are not finite; {FIX_NOT_FINITE}")


def repair(runner: ModelRunner, run: RefitRun, weight: Tensor) -> Tensor | None:
    """Return the new weight of a linear, as stored; None if no damping lowers the error.

    The damping has the least error on the validation chunks; all chunks give the weight. UserError if the linear adds
    nothing to the hidden states.
    """
    block, end, linear = run.refit
    transposed = runner.decoder.linears(block)[linear].transposed
    # As in JetMoE, where all linears but the one of keys and values are experts'.
    if weight.shape[1 if transposed else 0] != run.store.width:
        raise UserError(f"reconstruction: {linear} adds nothing to the hidden states; set recipe=wanda")
    validation = runner.chunks[::VALIDATION_STRIDE]
    fitting = [chunk for chunk in runner.chunks if chunk.number % VALIDATION_STRIDE] or validation  # of a single chunk
    sums = runner.merge(sum_lacking, run, fitting, RepairSums(), "repair, chunk")

    weights = [new_weight(weight, sums, linear, damping, transposed=transposed) for damping in DAMPINGS]
    changes = [WeightChange({}, {linear: changed}) for changed in weights]
    squares = list(runner.map(try_changes, (run, changes), validation, "repair, chunk"))
    totals = torch.stack(squares).sum(dim=0)
    unrepaired, *errors = totals.sqrt().nan_to_num(torch.inf, torch.inf).tolist()  # of an overflow: NaN
    error, damping = min(zip(errors, DAMPINGS, strict=True))
    if not error < unrepaired:
        if end > block + 1:
            notice(
                f"mask: {linear} keeps its weights: on held-out windows it cannot take over what blocks {block + 1} to "
                f"{end - 1} add; the error would be {error:.4g} instead of {unrepaired:.4g}"
            )
        return None
    if fitting is not validation:
        sums.merge(runner.merge(sum_lacking, run, validation, RepairSums(), "repair, chunk"))
    return new_weight(weight, sums, linear, damping, transposed=transposed)


def new_weight(weight: Tensor, sums: RepairSums, linear: str, damping: float, *, transposed: bool) -> Tensor:
    """Return W + D, as stored: D = RᵀX (G + λI)⁻¹, λ = damping · mean diagonal of G."""
    root = GramFactors(sums.grams[linear].matrix(), damping=damping).inverse_root  # rootᵀ root = (G + λI)⁻¹
    difference = multiply(multiply(sums.crosses[linear].sum.float(), root.T), root)
    return (weight.float() + oriented(difference, transposed).to(weight.device)).to(weight.dtype).contiguous()


@in_smaller_batches
@torch.no_grad()
def sum_lacking(model: Decoder, run: RefitRun, chunk: Chunk) -> RepairSums:
    """Return a chunk's sums for a linear: of its input, and of what the hidden states lack at the refit's end."""
    block, end, linear = run.refit
    model.load(block, -1)
    sums, inputs = RepairSums(), list[Tensor]()
    batches = model.batches(chunk.sequences, streamed=not run.store.on_device)
    before = run.store.read_batches(block, chunk.number, batches, model.copies)
    wanted = run.dense_store.read_batches(end, chunk.number, batches, model.copies)
    with observing({linear: model.linears(block)[linear]}, lambda _, x, __: inputs.append(x)):
        for batch, states_before, states_wanted in zip(batches, before, wanted, strict=True):
            missing = states_wanted.float() - model.run(block, states_before, batch[0]).float()
            sums.add(linear, inputs.pop().flatten(0, -2), missing.flatten(0, -2))
    return sums


@in_smaller_batches
@torch.no_grad()
def try_changes(
    model: Decoder, job: tuple[RefitRun, Sequence[WeightChange]], chunk: Chunk
) -> Float[Tensor, " changes"]:
    """Return ‖block's outputs − dense hidden states before the end‖² of a chunk: unchanged, then with each change."""
    run, changes = job
    number, end, _ = run.refit
    wanted = run.dense_store.read(end, chunk.number)
    errors = [squared_error(run.store.read(number + 1, chunk.number), wanted)]
    for change in changes:
        model.load(number, -1, change)
        outputs = itertools.chain.from_iterable(run_batches(model, BlockRun(number, run.store), chunk, []))
        errors.append(squared_error(outputs, wanted))
    return torch.tensor(errors, dtype=torch.float64)


def squared_error(outputs: Iterable[Tensor], wanted: Hidden) -> float:
    """Return ‖outputs − wanted‖² over some sequences."""
    error = 0.0
    for output, states in zip(outputs, wanted, strict=True):
        error += vector_norm(output.cpu().float() - states.cpu().float()).item() ** 2
    return error
