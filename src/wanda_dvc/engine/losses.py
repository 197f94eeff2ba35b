"""Computes losses from hidden states, and a perplexity from losses."""

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from wanda_dvc.engine import shards
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.rows import Row
from wanda_dvc.reading import DIVERGED


def window_loss(decoder: Decoder, hidden: Float[Tensor, "1 length width"], tokens: Int[Tensor, " length"]) -> float:
    """Return the mean cross-entropy, in nats, of all tokens but the first, each given the tokens before it."""
    losses = [total_loss(log_p, targets) for log_p, targets in log_probabilities(decoder, hidden, tokens)]
    return float(sum(torch.stack(losses).tolist())) / (len(tokens) - 1)


def log_probabilities(
    decoder: Decoder, hidden: Float[Tensor, "1 length width"], tokens: Int[Tensor, " length"]
) -> Iterator[tuple[Float32[Tensor, "chunk vocabulary"], Int[Tensor, " chunk"]]]:
    """Yield the log-probabilities of all next tokens, and the text's own next tokens, by chunks of positions."""
    tokens = tokens.to(decoder.device)
    for positions, logits in decoder.logits(hidden, tokens):
        targets = tokens[1:][positions.start : positions.stop]  # the last token predicts nothing
        if len(targets):
            yield logits[: len(targets)].float().log_softmax(-1), targets


def total_loss(log_p: Float32[Tensor, "chunk vocabulary"], targets: Int[Tensor, " chunk"]) -> Float32[Tensor, ""]:
    """Return the sum of the tokens' losses."""
    return torch.nn.functional.nll_loss(log_p, targets, reduction="sum")


def window_losses(
    decoder: Decoder, rows: Sequence[Row], hidden: Sequence[Float[Tensor, "_ width"]], skipped: int
) -> Iterator[float]:
    """Yield the loss of each window but the first `skipped`, from its hidden states after the last block."""
    for row, states in list(zip(rows, hidden, strict=True))[skipped:]:
        yield window_loss(decoder, states[None], row.tokens)


def unmeasured(windows: int, done: int = 0) -> dict[int, int]:
    """Return the shards with windows after the first `done`, and the number of windows to skip in each."""
    return {n: max(done - shard.start, 0) for n, shard in enumerate(shards.cut(windows)) if shard.stop > done}


def from_losses(losses: list[float], predictions: list[int]) -> float | str:
    """Return exp(total loss / predictions), to six significant digits: later digits vary by machine.

    `losses` are means per window. If all windows have one length, the result is the papers' exp(mean).
    """
    equal = len(set(predictions)) == 1  # avoids rounding by equal weights
    weighted = losses if equal else [loss * count for loss, count in zip(losses, predictions, strict=True)]
    mean = math.fsum(weighted) / (len(losses) if equal else sum(predictions))
    if not mean < math.log(torch.finfo(torch.float64).max):
        return DIVERGED
    return float(f"{math.exp(mean):.6g}")
