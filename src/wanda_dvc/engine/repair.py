"""The repair for neighbouring blocks that go: the last linear before them takes over a part of what they add.

ReplaceMe (arXiv 2505.02819) multiplies this linear's outputs by a matrix. A new weight W + D can do more, as it has
more columns: D is least squares from the linear's input to the difference of the hidden states. No parameter is added.
"""

from collections.abc import Iterable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.linalg import vector_norm

from wanda_dvc.engine.activations import ActivationStore
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.forward import ModelRunner
from wanda_dvc.engine.load import WeightChange
from wanda_dvc.engine.record import InputRecorder
from wanda_dvc.engine.sequences import Chunk
from wanda_dvc.engine.sums import InputSums
from wanda_dvc.errors import UserError
from wanda_dvc.kernels import multiply
from wanda_dvc.pruning.reconstruction import oriented
from wanda_dvc.pruning.solvers import GramFactors

HELD_OUT = 4  # the dampings are tried on every so many-th shard
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


def repair(
    runner: ModelRunner, linear: str, weight: Tensor, *, block: int, end: int
) -> tuple[Tensor, dict[str, float]]:
    """Return the new weight of a block's last linear, as stored, if the blocks after it and before `end` go.

    A walk up to `end` has kept the hidden states. The damping is the one with the least error of these on held-out
    rows; all rows give the weight. The second result has the damping, and the error over that without a repair.
    UserError if no damping lowers the error, which a norm after the linear may prevent.
    """
    across = runner.decoder.linears(block)[linear].transposed
    if weight.shape[int(across)] != runner.own.width:  # JetMoE: all else is experts
        raise UserError(f"reconstruction: {linear} adds nothing to the hidden states; set recipe=wanda")
    held = runner.shards[::HELD_OUT]
    fitted = [shard for number, shard in enumerate(runner.shards) if number % HELD_OUT] or held
    recording = partial(run_before, runner.own, block, end, linear)
    some, others = (runner.sum(recording, InputSums(), shards, "repair, shard") for shards in (fitted, held))

    def changed(sums: InputSums, damping: float) -> Tensor:
        root = GramFactors(sums.grams[linear].matrix()).inverse_root(damping).matrix
        found = multiply(multiply(sums.crosses[linear].sum.float(), root.T), root)  # D = RᵀX (G + λI)⁻¹
        return (weight.float() + oriented(found, across).to(weight.device)).to(weight.dtype).contiguous()

    changes = [WeightChange({}, {}), *(WeightChange({}, {linear: changed(some, damping)}) for damping in DAMPINGS)]
    trying = partial(run_changed, runner.own, block, end, changes)
    before, *errors = torch.stack([*runner.map(trying, held, "repair, shard")]).sum(dim=0).sqrt().tolist()
    least, damping = min(zip(errors, DAMPINGS, strict=True))
    if not least < before:
        raise UserError(
            f"reconstruction: {linear} cannot take over the outputs of blocks {block + 1} to {end - 1}: the error on "
            f"held-out windows is {least:.4g}, expected less than {before:.4g}, the error without a change; set "
            "recipe=wanda"
        )
    some.merge(others)
    return changed(some, damping), {"damping": damping, "held_out": least / before}


@torch.no_grad()
def run_before(states: ActivationStore, index: int, end: int, linear: str, model: Decoder, shard: Chunk) -> InputSums:
    """Return a shard's XᵀX and RᵀX: X is the input of a block's linear, R what the blocks after it add until `end`."""
    model.load(index, -1)
    recorder = InputRecorder(linears={linear: model.linears(index)[linear]}, gram=True)
    boundaries = (states.read(boundary, shard.number) for boundary in (index, index + 1, end))
    with recorder.recording():
        for row, before, after, wanted in zip(shard.rows, *boundaries, strict=True):
            recorder.cross(linear, wanted.to(model.device).float() - after.to(model.device).float())
            model.run(index, before[None].to(model.device), row)
            recorder.end_window()
    return recorder.sums


@torch.no_grad()
def run_changed(
    states: ActivationStore, index: int, end: int, changes: Iterable[WeightChange], model: Decoder, shard: Chunk
) -> Float[Tensor, " changes"]:
    """Return for each change of a block Σ ‖y − h‖² over a shard: y is the block's output, h the state at `end`."""
    errors = []
    boundaries = [states.read(boundary, shard.number) for boundary in (index, end)]
    for change in changes:
        model.load(index, -1, change)
        rows = zip(shard.rows, *boundaries, strict=True)
        made = ((model.run(index, x[None].to(model.device), row)[0].cpu(), wanted) for row, x, wanted in rows)
        errors.append(sum(vector_norm(y.float() - wanted.cpu().float()).item() ** 2 for y, wanted in made))
    return torch.tensor(errors, dtype=torch.float64)
