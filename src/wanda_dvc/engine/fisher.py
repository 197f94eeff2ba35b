"""The Fisher tier: the sensitivity of a text's loss to each output of a block's linears.

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


def block_order(blocks: int) -> list[int]:
    """Return the order in which blocks run: forward, then backward."""
    return [*range(blocks), *reversed(range(blocks))]


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
    run, blocks = BackwardPass(decoder, rows, work, kept=kept), len(decoder.blocks)
    report_resumed(run.finished - blocks, blocks, " of the backward pass")
    try:
        for index in run.order[run.finished :]:
            recorder = GradientRecorder(gram=gram)
            with decoder.block(index, run.then):
                run.advance(recorder)
            if run.finished >= blocks:
                recorder.check_finite(decoder.checkpoint, index)
                yield index, recorder
            run.finish_block()
    finally:
        decoder.forget_calls()


class BackwardPass:
    """Runs some rows forward and backward through all blocks; `finished` counts blocks in `block_order`."""

    @torch.no_grad()
    def __init__(self, decoder: Decoder, rows: Sequence[Row], folder: Path, *, kept: int) -> None:
        """Resume from the files of an interrupted run, as `backward` does; with `kept` −1 start again."""
        decoder.check_tokens(rows)
        for row in rows:
            decoder.calls(row)
        lengths, blocks = [len(row.tokens) for row in rows], len(decoder.blocks)
        self.decoder, self.rows, self.order = decoder, rows, block_order(blocks)
        width = decoder.model.config.get_text_config().hidden_size
        places = {"device": decoder.device, "room": decoder.room() // (blocks + 3)}  # for each
        self._before = [
            HiddenStates.open(folder / f"before_{n:03d}", lengths, width, decoder.dtype, 0, **places)
            for n in range(blocks + 1)
        ]
        self._gradients = HiddenStates.open(folder / "gradients", lengths, width, torch.float32, blocks, **places)
        complete = 0 if kept == -1 else next((n for n, x in enumerate(self._before) if x.finished < 0), blocks + 1)
        for states in self._before[complete:]:
            states.finished = -1
        if complete <= blocks or self._gradients.finished > kept:
            self._gradients.finished = -1
        if complete == 0:
            self._before[0].write(decoder.embed(row)[0] for row in rows)
            self._before[0].finish_block()
        self.finished = max(0, complete - 1) + max(0, self._gradients.finished)

    @property
    def block(self) -> int:
        """The next block."""
        return self.order[self.finished]

    @property
    def then(self) -> int:
        """The block after the next, or −1."""
        return [*self.order, -1][self.finished + 1]

    @torch.no_grad()
    def advance(self, recorder: GradientRecorder) -> None:
        """Run every row through the next block; in the backward half a recorder sees the gradients of outputs."""
        decoder, index = self.decoder, self.block
        if self.finished < len(decoder.blocks):
            waiting = zip(self._before[index].before, self.rows, strict=True)
            self._before[index + 1].write(decoder.run(index, x[None].to(decoder.device), row)[0] for x, row in waiting)
            return
        if self._gradients.finished < 0:
            self._gradients.write(loss_gradients(decoder, self.rows, self._before[-1].before))
            self._gradients.finish_block()
        coming = zip(self._before[index].before, self._gradients.before, self.rows, strict=True)
        self._gradients.write(back(decoder, index, coming, recorder))

    def finish_block(self) -> None:
        """Finish the block: its output files become the next block's input."""
        blocks = len(self.decoder.blocks)
        (self._before[self.finished + 1] if self.finished < blocks else self._gradients).finish_block()
        self.finished += 1


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
