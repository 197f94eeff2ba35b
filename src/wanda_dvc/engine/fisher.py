"""The gradients tier: the sensitivity of a text's loss to each output of a block's linears.

Every row runs forward and then backward through all blocks, one block at a time. Files hold the hidden states before
each block and the gradients between blocks, so an interrupted run resumes at the last finished block. The unit of work
is one block on one row.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.recorder import GradientRecorder, Gradients
from wanda_dvc.engine.rows import Row, as_rows
from wanda_dvc.engine.states import HiddenStates, Progress
from wanda_dvc.engine.walk import Block, Opened, Rows, Runner, Shard, by_stream, embed, report_resumed, run_block


def backward(runner: Runner, rows: Rows, *, gram: bool = False, kept: int = 0) -> Iterator[tuple[int, Gradients]]:
    """Yield each block, the last one first, and by linear Σ ‖x‖² (∂ℓ/∂y)² over all tokens, [out].

    With `gram` also Σ ‖x‖² (∂ℓ/∂y)(∂ℓ/∂y)ᵀ by linear, [out, out]; its diagonal is the first sum.

    x and y are the linear's input and output at one token; ℓ = −Σ log p(token) over the row, with the text's own
    tokens. The sum is, for each row of the weight, the trace of its empirical Fisher information, with the tokens taken
    as independent; K-FAC factors the same matrices (Martens and Grosse 2015, arXiv 1503.05671).
    Linears without a gradient, as in an expert without tokens, are missing.

    Resumes after the last block that an interrupted run has finished in the runner's folder. The caller has the results
    of the last `kept` blocks; if more are finished, the backward half starts again. Memory: one block, and autograd's
    copies for one row in it. Disk: the hidden states of all rows, once for each block.

    Raises:
        UserError: A gradient is not finite.
    """
    decoder, blocks, folder = runner.decoder, runner.blocks, runner.work / "back"
    every = [Shard(number, [row]) for number, row in enumerate(as_rows(rows))]
    decoder.check_tokens(as_rows(rows))
    room = decoder.room() // 2
    before = runner.states(folder / "before", every, kept=blocks + 2, room=room)
    gradients = runner.states(folder / "gradients", every, dtype=torch.float32, room=room)
    forward = Progress.open(folder / "forward", {"own": before}, blocks)
    back = Progress.open(folder / "backward", {"gradients": gradients}, blocks)
    if forward.finished < blocks or back.finished > kept:
        back.restart()
    report_resumed(back.finished, blocks, " of the backward pass")
    try:
        if forward.finished < 0:
            done = runner.map(partial(embed, runner.opened, {"own": before}), every, "embeddings, window")
            forward.finish(by_stream(done))
        for index in range(forward.finished, blocks):
            block = Block(index, min(index + 1, blocks - 1), before)  # the last one runs backward next
            done = runner.map(partial(run_block, runner.opened, block), every, f"block {index}, window")
            forward.finish(by_stream(done))
        if back.finished < 0:
            turning = partial(turn, runner.opened, before, gradients)
            back.finish({"gradients": list(runner.map(turning, every, "output head, window"))})
        for index in reversed(range(blocks - back.finished)):
            total, checksums = Gradients(), list[int]()
            backing = partial(run_back, runner.opened, index, before, gradients, gram)
            for one in runner.map(backing, every, f"backward pass, block {index}, window"):
                total.merge(one.sums)
                checksums.append(one.checksum)
                del one  # before the next row's sums are there
            total.check_finite(decoder.checkpoint, index)
            yield index, total
            back.finish({"gradients": checksums}, last=index == 0)
    finally:
        decoder.release()
        decoder.forget_calls()


class Back(NamedTuple):
    """The result of one block's backward pass on one row."""

    sums: Gradients
    checksum: int  # of the gradients by the hidden states before the block


@torch.no_grad()
def turn(opened: Opened, before: HiddenStates, gradients: HiddenStates, device: torch.device, shard: Shard) -> int:
    """Write the gradient of a row's loss by its hidden states after the last block; return its checksum."""
    model, (row,) = opened(device), shard.rows
    (last,) = before.read(len(model.blocks), shard.number)
    return gradients.write(0, shard.number, [model.loss_gradient(last[None], row.tokens)[0]])


@torch.no_grad()
def run_back(  # noqa: PLR0913, PLR0917 - small values, and files
    opened: Opened,
    index: int,
    before: HiddenStates,
    gradients: HiddenStates,
    gram: bool,
    device: torch.device,
    shard: Shard,
) -> Back:
    """Write the gradient of a row's loss by its hidden states before a block, from the gradient after the block."""
    model, (row,), recorder = opened(device), shard.rows, GradientRecorder(gram=gram)
    done = len(model.blocks) - 1 - index
    model.calls(row)  # the first call runs the first block, which must not be loaded yet
    model.hold(index, index - 1)
    (states,), (after,) = before.read(index, shard.number), gradients.read(done, shard.number)
    with recorder.recording(model.linears(index)):
        checksum = gradients.write(done + 1, shard.number, [_back(model, index, states, after, row)])
    return Back(recorder.only_sums(), checksum)


def _back(
    model: Decoder,
    index: int,
    before: Float[Tensor, "length width"],
    gradient: Float[Tensor, "length width"],
    row: Row,
) -> Float[Tensor, "length width"]:
    """Return the gradient of a row's loss by its hidden states before a block, from the gradient after it."""
    hidden = before[None].to(model.device, copy=True).requires_grad_()
    weights = {name: parameter.detach() for name, parameter in model.blocks[index].named_parameters()}
    with torch.enable_grad():
        out = model.run(index, hidden, row, weights)
    (back,) = torch.autograd.grad(out, hidden, gradient[None].to(out))
    return back[0].float()
