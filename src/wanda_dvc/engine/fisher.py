"""The Fisher tier: how much the loss of a text depends on each output of a block's linears.

Every row goes forward through all blocks and back through all blocks, one block at a time. The hidden states before
each block and the gradients between two blocks wait in files, so a killed run continues from the last finished block.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.recorder import GradientRecorder
from wanda_dvc.engine.rows import Row, as_rows
from wanda_dvc.engine.states import HiddenStates
from wanda_dvc.engine.walk import check_tokens
from wanda_dvc.errors import MEND, UserError, notice
from wanda_dvc.pruning.gram import Gram


@torch.no_grad()
def squared_gradients(
    decoder: Decoder, rows: Sequence[Row] | Int[Tensor, "samples length"], work: Path, *, gram: bool = False
) -> Iterator[tuple[int, dict[str, Float64[Tensor, " out"]], dict[str, Gram]]]:
    """Yield each block, the last one first, and by linear Σ (∂ℓ/∂y)² over all tokens, [out].

    With `gram` also by linear Σ (∂ℓ/∂y)(∂ℓ/∂y)ᵀ, [out, out], whose diagonal that is; without, an empty dictionary.

    y is what the linear puts out at one token, and ℓ = −Σ log p(token) over the row, with the text's own tokens. It is
    the diagonal of the output's factor of K-FAC's Fisher information (Martens and Grosse 2015, arXiv 1503.05671),
    the empirical one. A linear that no gradient comes to, as an expert that no token is sent to, has none.

    Goes on after the last block that was taken by the caller in an earlier run in `work`. Memory: one block, and what
    autograd keeps of one row in it. Disk: the hidden states of all rows, once for each block.

    Raises:
        UserError: A gradient is not finite.
    """
    rows = as_rows(rows)
    check_tokens(decoder, rows)
    lengths, blocks = [len(row.tokens) for row in rows], len(decoder.blocks)
    width = decoder.model.config.get_text_config().hidden_size
    gradients = HiddenStates.open(work / "gradients", lengths, width, torch.float32, blocks)
    before = [HiddenStates.open(work / f"before_{n:03d}", lengths, width, decoder.dtype, 0) for n in range(blocks + 1)]
    try:
        for row in rows:
            decoder.calls(row)
        for index, states in enumerate(before):
            if states.finished < 0:
                _forward(decoder, rows, index, before)
        if gradients.finished < 0:
            last = before[-1].before
            gradients.write(decoder.loss_gradient(x[None], row.tokens)[0] for x, row in zip(last, rows, strict=True))
            gradients.turn()
        if gradients.finished > 0:
            done = f"{gradients.finished} of {blocks} blocks"
            notice(f"going on after {done} on the way back, which an earlier run has finished")
        for index in reversed(range(blocks - gradients.finished)):
            recorder = GradientRecorder(gram=gram)
            with decoder.block(index), recorder.recording(decoder.linears(index)):
                waiting = zip(before[index].before, gradients.before, rows, strict=True)
                gradients.write(_back(decoder, index, *one) for one in waiting)
            for name, sums in recorder.sums.items():
                if not sums.isfinite().all():
                    raise UserError(
                        f"{decoder.checkpoint}: block {index}, output of {name}: gradients that are not finite, "
                        f"expected finite ones; {MEND}"
                    )
            yield index, recorder.sums, recorder.grams
            gradients.turn()
    finally:
        decoder.forget_calls()


def _forward(decoder: Decoder, rows: Sequence[Row], index: int, before: Sequence[HiddenStates]) -> None:
    """Write the hidden states of all rows before a block, or after the last one."""
    if index == 0:
        before[0].write(decoder.embed(row)[0] for row in rows)
    else:
        waiting = zip(before[index - 1].before, rows, strict=True)
        with decoder.block(index - 1):
            before[index].write(decoder.run(index - 1, x[None].to(decoder.device), row, {})[0] for x, row in waiting)
    before[index].turn()


def _back(
    decoder: Decoder,
    index: int,
    before: Float[Tensor, "length width"],
    gradient: Float[Tensor, "length width"],
    row: Row,
) -> Float[Tensor, "length width"]:
    """Return the gradient of a row's loss by its hidden states before a block, from that after it."""
    hidden = before[None].to(decoder.device, copy=True).requires_grad_()
    weights = {name: parameter.detach() for name, parameter in decoder.blocks[index].named_parameters()}
    with torch.enable_grad():
        out = decoder.run(index, hidden, row, weights)
    (back,) = torch.autograd.grad(out, hidden, gradient[None].to(out))
    return back[0].float()
