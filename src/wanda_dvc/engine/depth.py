"""Measures which blocks a model can do without, by the divergence of its predictions without them.

Blocks are chosen one after another, as in SLEB (Song et al. 2024, arXiv 2402.09025), by KL(dense ‖ without the blocks)
instead of perplexity. All choices of one number of blocks run in one pass, which reads each block's weights once.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.divergence import Predictions, kl_divergence, measure
from wanda_dvc.engine.forward import BlockRun, ModelRunner, embed, run_block
from wanda_dvc.engine.sequences import Chunk, Hidden, TokenSequence
from wanda_dvc.engine.sums import InputSums
from wanda_dvc.errors import FIX_NOT_FINITE, UserError

CANDIDATES = 8  # at least, and a quarter of the blocks: those measured after the first choice
STRIDE = 4  # of the compared predictions
RUNNERS_UP = 2  # the next best candidates, which are also tried in place of each block that was chosen before
Blocks = Sequence[int]  # removed ones, in the order of their choice


class DepthChoice(NamedTuple):
    """The best measured choice of a number of blocks to remove."""

    removed: Blocks
    divergence: float  # mean KL(dense ‖ without the blocks) over predictions, in nats
    # By block: the rise of the divergence without this block too, when last measured; None: it stays.
    rises: Sequence[float | None]


def no_choice(blocks: int) -> DepthChoice:
    """Return the choice of no block. The first block stays: no linear before it could take over what it adds."""
    return DepthChoice([], 0.0, [None] + [0.0] * (blocks - 1))


def choose_one_more(choice: DepthChoice, measure: Callable[[Sequence[Blocks]], Sequence[float]]) -> DepthChoice:
    """Return the best choice with one block more. `measure` returns the divergence without each group of blocks.

    The candidates are the blocks with the least rises. Then each block that was chosen before is put back, and the next
    best candidates are tried in its place. UserError if all predictions without a further block are not finite.
    """
    removed, rises = choice.removed, list(choice.rises)
    left = sorted((rise, block) for block, rise in enumerate(rises) if rise is not None and block not in removed)
    most = max(CANDIDATES, len(rises) // 4) if removed else len(left)
    blocks = [block for _, block in left[:most]]
    measured = []
    for block, divergence in zip(blocks, measure([[*removed, block] for block in blocks]), strict=True):
        rises[block] = divergence - choice.divergence if divergence < math.inf else None
        measured.append((divergence, block))
    measured.sort()
    # None is measured if, without each block that is left, predictions were not finite before.
    if not measured or measured[0][0] == math.inf:
        raise UserError(f"without {len(removed) + 1} blocks: predictions that are not finite; {FIX_NOT_FINITE}")
    least, best = measured[0]
    groups = [[*removed, best]]
    for _, runner_up in measured[1 : 1 + RUNNERS_UP]:
        for put_back in removed:
            groups.append([*(block for block in groups[0] if block != put_back), runner_up])
    least, group = min(zip([least, *measure(groups[1:])], groups, strict=True))
    return DepthChoice(group, least, rises)


def measure_dense(runner: ModelRunner, windows: Sequence[TokenSequence]) -> list[Predictions]:
    """Return the dense model's predictions of each window."""
    return list(run_without(runner, windows, [[]], [None] * len(windows)))


def measure_choices(
    runner: ModelRunner, windows: Sequence[TokenSequence], groups: Sequence[Blocks], dense: Sequence[Predictions]
) -> Iterator[float]:
    """Yield the divergence without each group of blocks, in nats, to six digits; infinity if it is not finite."""
    predictions = run_without(runner, windows, groups, dense)
    for _ in groups:
        kl = [kl_divergence(reference, next(predictions)).mean().item() for reference in dense]
        divergence = float(f"{math.fsum(kl) / len(kl):.6g}")
        yield divergence if math.isfinite(divergence) else math.inf


def predict_every_fourth(
    decoder: Decoder, windows: Sequence[TokenSequence], hidden: Hidden, dense: Sequence[Predictions | None]
) -> Iterator[Predictions]:
    """Yield a model's predictions of every fourth token of each window, because neighbours tell little that is new."""
    for window, states, reference in zip(windows, hidden, dense, strict=True):
        tokens = torch.cat([window.tokens[:1], window.tokens[1::STRIDE]])
        before = torch.cat([states[:-1:STRIDE], states[-1:]])  # `measure` leaves the last one out
        yield measure(decoder, before[None], tokens, reference)[1]


def run_without(
    runner: ModelRunner, windows: Sequence[TokenSequence], groups: Sequence[Blocks], dense: Sequence[Predictions | None]
) -> Iterator[Predictions]:
    """Yield the model's predictions of each window, without each group of blocks. No two groups are equal.

    Groups that remove the same blocks so far share the activations of the first of them. A `Chunk` is here a group of
    removed blocks, with all windows.
    """
    runner.chunks = [Chunk(number, range(len(windows)), windows) for number in range(len(groups))]
    store = runner.new_store("without", kept=1)
    runner.stores = [store]
    for _ in runner.map(embed, [store], runner.chunks[:1], "embeddings"):
        pass
    before = sharing(groups, 0)
    for block in range(len(runner.decoder.blocks)):
        after = sharing(groups, block + 1)
        kept = []
        for number in sorted(set(after)):
            if number != before[number]:  # from this block on its activations are its own
                store.write(block, number, store.read(block, before[number]))
            if block in groups[number]:
                store.write(block + 1, number, store.read(block, number))
            else:
                kept.append(runner.chunks[number])
        runner.merge(run_block, BlockRun(block, store), kept, InputSums(), f"block {block}, choice")
        store.drop(block + 1)
        before = after
    runner.decoder.unload()
    yield from runner.map_outputs(predict_every_fourth, lambda _: dense)


def sharing(groups: Sequence[Blocks], end: int) -> list[int]:
    """Return for each group the first one that removes the same blocks before `end`."""
    first: dict[frozenset[int], int] = {}
    return [first.setdefault(frozenset(x for x in group if x < end), number) for number, group in enumerate(groups)]
