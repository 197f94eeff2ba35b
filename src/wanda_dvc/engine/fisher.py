"""The gradients tier: the sensitivity of a text's loss to each output of a block's linears.

Every row runs forward and then backward through all blocks, one block at a time. Files hold the hidden states before
each block and the gradients between blocks, so an interrupted run resumes at the last finished block.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.recorder import GradientRecorder, Gradients
from wanda_dvc.engine.rows import Row
from wanda_dvc.engine.runner import report_resumed
from wanda_dvc.engine.states import HiddenStates


@torch.no_grad()
def backward(
    decoder: Decoder, rows: Sequence[Row], work: Path, *, gram: bool = False, kept: int = 0
) -> Iterator[tuple[int, Gradients]]:
    """Yield each block, the last one first, and by linear Σ ‖x‖² (∂ℓ/∂y)² over all tokens, [out].

    With `gram` also Σ ‖x‖² (∂ℓ/∂y)(∂ℓ/∂y)ᵀ by linear, [out, out]; its diagonal is the first sum.

    x and y are the linear's input and output at one token; ℓ = −Σ log p(token) over the row, with the text's own
    tokens. The sum is, for each row of the weight, the trace of its empirical Fisher information, with the tokens taken
    as independent; K-FAC factors the same matrices (Martens and Grosse 2015, arXiv 1503.05671).
    Linears without a gradient, as in an expert without tokens, are missing.

    Resumes after the last block that an interrupted run has finished in `work`. The caller has the results of the last
    `kept` blocks; if more are finished, the backward half starts again. Memory: one block, and autograd's copies for
    one row in it. Disk: the hidden states of all rows, once for each block.

    Raises:
        UserError: A gradient is not finite.
    """
    decoder.check_tokens(rows)
    for row in rows:
        decoder.calls(row)
    blocks, (before, gradients) = len(decoder.blocks), _open(decoder, rows, work, kept)
    report_resumed(gradients.finished, blocks, " of the backward pass")
    try:
        if before[0].finished < 0:
            before[0].write(decoder.embed(row)[0] for row in rows)
            before[0].finish_block()
        for index in range(sum(states.finished >= 0 for states in before) - 1, blocks):
            with decoder.block(index, min(index + 1, blocks - 1)):  # the last one runs backward next
                waiting = zip(before[index].before, rows, strict=True)
                before[index + 1].write(decoder.run(index, x[None].to(decoder.device), row)[0] for x, row in waiting)
            before[index + 1].finish_block()
        if gradients.finished < 0:
            gradients.write(loss_gradients(decoder, rows, before[-1].before))
            gradients.finish_block()
        for index in reversed(range(blocks - gradients.finished)):
            recorder = GradientRecorder(gram=gram)
            with decoder.block(index, index - 1):
                coming = zip(before[index].before, gradients.before, rows, strict=True)
                gradients.write(back(decoder, index, coming, recorder))
            recorder.check_finite(decoder.checkpoint, index)
            yield index, recorder
            gradients.finish_block()
    finally:
        decoder.forget_calls()


def _open(decoder: Decoder, rows: Sequence[Row], folder: Path, kept: int) -> tuple[list[HiddenStates], HiddenStates]:
    """Return the hidden states before each block and after the last one, and the gradients, as far as they are valid.

    They are valid up to the first incomplete ones. Gradients are not if the caller has fewer blocks than they had.
    """
    lengths, blocks = [len(row.tokens) for row in rows], len(decoder.blocks)
    width = decoder.model.config.get_text_config().hidden_size
    places = {"device": decoder.device, "room": decoder.room() // (blocks + 3)}  # for each
    before = [
        HiddenStates.open(folder / f"before_{number:03d}", lengths, width, decoder.dtype, 0, **places)
        for number in range(blocks + 1)
    ]
    gradients = HiddenStates.open(folder / "gradients", lengths, width, torch.float32, blocks, **places)
    complete = next((number for number, states in enumerate(before) if states.finished < 0), len(before))
    for states in before[complete:]:
        states.finished = -1
    if complete < len(before) or gradients.finished > kept:
        gradients.finished = -1
    return before, gradients


def loss_gradients(
    decoder: Decoder, rows: Sequence[Row], last: Sequence[Float[Tensor, "_ width"]]
) -> Iterator[Float[Tensor, "_ width"]]:
    """Yield the gradient of each row's loss by its hidden states after the last block."""
    for states, row in zip(last, rows, strict=True):
        yield decoder.loss_gradient(states[None], row.tokens)[0]


def back(
    decoder: Decoder,
    index: int,
    coming: Iterable[tuple[Float[Tensor, "_ width"], Float[Tensor, "_ width"], Row]],
    recorder: GradientRecorder,
) -> Iterator[Float[Tensor, "_ width"]]:
    """Yield the gradient of each row's loss by its hidden states before a block.

    `coming` has each row's hidden states and its gradient after the block. A recorder sees the gradients of outputs.
    """
    with recorder.recording(decoder.linears(index), decoder.uncalled(index)):
        for states, gradient, row in coming:
            yield _back(decoder, index, states, gradient, row)


def _back(
    decoder: Decoder,
    index: int,
    before: Float[Tensor, "length width"],
    gradient: Float[Tensor, "length width"],
    row: Row,
) -> Float[Tensor, "length width"]:
    """Return the gradient of a row's loss by its hidden states before a block, from the gradient after it."""
    hidden = before[None].to(decoder.device, copy=True).requires_grad_()
    weights = {name: parameter.detach() for name, parameter in decoder.blocks[index].named_parameters()}
    with torch.enable_grad():
        out = decoder.run(index, hidden, row, weights)
    (back,) = torch.autograd.grad(out, hidden, gradient[None].to(out))
    return back[0].float()
