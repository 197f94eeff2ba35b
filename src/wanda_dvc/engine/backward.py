"""Runs sequences backward through all blocks, for the statistics `fisher`."""

import itertools
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from wanda_dvc.engine.activations import ActivationStore, PassProgress
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.fisher import FisherSums, GradientRecorder
from wanda_dvc.engine.forward import ModelRunner, Sequences
from wanda_dvc.engine.sequences import Chunk, TokenSequence
from wanda_dvc.engine.sums import check_finite

# --- the backward pass ---


def backward(runner: ModelRunner, rows: Sequences, *, kept: int = 0) -> Iterator[tuple[int, FisherSums]]:
    """Yield each block, the last one first, with its `Gradients` over all tokens.

    ℓ = −Σ log p(token) over the row, with the text's own tokens. The sums are, for each row of the weight, the trace of
    its empirical Fisher information, with the tokens taken as independent; K-FAC factors the same matrices (Martens and
    Grosse 2015, arXiv 1503.05671).

    Resumes after the last block that an interrupted run has finished in the runner's folder. The caller has the results
    of the last `kept` blocks; if more are finished, the backward half starts again. Memory: one block, and autograd's
    copies for one row in it. Disk: the hidden states of all rows, once a block. UserError if a gradient is not finite.
    """
    decoder, blocks = runner.decoder, len(runner.decoder.blocks)
    for step in runner.walk(rows, boundaries=blocks + 2):
        step.advance()
    before, gradients = runner.own, runner.states("gradients", dtype=torch.float32, share=2)
    back, turning = PassProgress(runner.work / "back", [gradients], kept), partial(turn, before, gradients)
    for number in runner.unfinished(back, turning, "output head back, shard", " of the backward pass"):
        index = blocks - 1 - number
        backing = partial(run_back, index, before, gradients)
        total = runner.sum(backing, FisherSums(), runner.shards, f"backward pass, block {index}, shard")
        check_finite(total.sums, f"{decoder.checkpoint}: block {index}, output", "gradients")
        yield index, total


@torch.no_grad()
def turn(before: ActivationStore, gradients: ActivationStore, model: Decoder, shard: Chunk) -> None:
    """Write the gradients of each row's loss by its hidden states after the last block."""
    pairs = zip(before.read(len(model.blocks), shard.number), shard.rows, strict=True)
    gradients.write(0, shard.number, (model.loss_gradient(x[None], row.tokens)[0] for x, row in pairs))


@torch.no_grad()
def run_back(
    index: int, before: ActivationStore, gradients: ActivationStore, model: Decoder, shard: Chunk
) -> FisherSums:
    """Write the gradients of each row's loss by its hidden states before a block, from those after the block.

    `before` has all boundaries; boundaries of `gradients` count from the last one.
    """
    done = len(model.blocks) - 1 - index
    model.load(index, index - 1)
    states, after = before.read(index, shard.number), gradients.read(done, shard.number)

    def back(before: Tensor, gradient: Tensor, row: TokenSequence) -> Tensor:
        hidden = before[None].to(model.device, copy=True).requires_grad_()
        with torch.enable_grad():
            out = model.run(index, hidden, row)
        return torch.autograd.grad(out, hidden, gradient[None].to(out))[0][0].float()

    recorder = GradientRecorder(model.linears(index))
    with recorder.recording():
        gradients.write(done + 1, shard.number, itertools.starmap(back, zip(states, after, shard.rows, strict=True)))
    return recorder.result()
