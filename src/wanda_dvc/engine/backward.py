"""Runs sequences backward through all blocks, for the statistics `fisher`."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from wanda_dvc.engine.activations import ActivationStore, PassProgress
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.forward import ModelInput, ModelRunner, in_smaller_batches
from wanda_dvc.engine.record import GradientRecorder
from wanda_dvc.engine.sequences import Chunk, States
from wanda_dvc.engine.sums import FisherSums, check_finite


@dataclass(frozen=True)
class BackwardRun:
    """A block to run backward, and the stores of activations and of the gradients of ℓ with respect to them."""

    index: int
    activations: ActivationStore  # before all blocks
    gradients: ActivationStore  # counted from the end: 0 is after the last block


def backward(runner: ModelRunner, sequences: ModelInput, *, finished: int = 0) -> Iterator[tuple[int, FisherSums]]:
    """Yield each block, the last one first, with its `FisherSums` over all tokens.

    ℓ = −Σ log p(token) over the sequence, with the text's own tokens. The sums are, for each row of the weight, the
    trace of its empirical Fisher information, with the tokens taken as independent; K-FAC factors the same matrices
    (Martens and Grosse 2015, arXiv 1503.05671).

    Resumes as `forward` does, by the number of `finished` blocks whose results the caller has. Disk holds the
    activations of all sequences before every block. UserError if a gradient is not finite.
    """
    blocks = len(runner.decoder.blocks)
    for step in runner.forward(sequences, kept=blocks + 1):
        step.run()
    gradients = runner.new_store("gradients", dtype=torch.float32, kept=1)
    progress = PassProgress(runner.work / "back", [gradients], finished)
    if progress.finished < 0:
        run = BackwardRun(blocks, runner.store, gradients)
        for _ in runner.map(run_loss, run, runner.chunks, "output head back, chunk"):
            pass
        progress.count_block()
    for place in runner.unfinished_blocks(progress, " of the backward pass"):
        run = BackwardRun(blocks - 1 - place, runner.store, gradients)
        total = runner.merge(run_backward, run, runner.chunks, FisherSums(), f"backward pass, block {run.index}, chunk")
        check_finite(total.squares, f"{runner.decoder.checkpoint}: block {run.index}, output", "gradients")
        yield run.index, total


@in_smaller_batches
@torch.no_grad()
def run_loss(model: Decoder, run: BackwardRun, chunk: Chunk) -> None:
    """Write the gradients of each sequence's loss with respect to its activations after the last block."""
    batches = model.batches(chunk.sequences, streamed=True)
    after = run.activations.read_batches(len(model.blocks), chunk.number, batches, model.copies)
    tokens = (torch.stack([x.tokens for x in batch]) for batch in batches)
    run.gradients.write(0, chunk.number, map(model.loss_gradient, after, tokens))


@in_smaller_batches
@torch.no_grad()
def run_backward(model: Decoder, run: BackwardRun, chunk: Chunk) -> FisherSums:
    """Write the gradients of each sequence's loss before a block, from those after the block."""
    model.load(run.index, run.index - 1)
    blocks_done = len(model.blocks) - 1 - run.index
    streamed = not (run.activations.on_device and run.gradients.on_device)
    batches = model.batches(chunk.sequences, streamed=streamed, copies=3)  # autograd's

    def gradients() -> Iterator[States]:
        before = run.activations.read_batches(run.index, chunk.number, batches, model.copies)
        after = run.gradients.read_batches(blocks_done, chunk.number, batches, model.copies)
        for batch, states, gradient in zip(batches, before, after, strict=True):
            hidden = states.clone().requires_grad_()
            with torch.enable_grad():
                out = model.run(run.index, hidden, batch[0])
            yield torch.autograd.grad(out, hidden, gradient.to(out))[0].float()

    heads = getattr(model.model.config.get_text_config(), "num_key_value_heads", None) or 0
    recorder = GradientRecorder(model.linears(run.index), heads)
    with recorder.recording():
        run.gradients.write(blocks_done + 1, chunk.number, gradients())
    return recorder.result()
