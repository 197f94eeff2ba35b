"""Measures a model's predictions of the next tokens: its loss, and its divergence from the dense model.

A complete distribution is too large to keep. Of the dense model's, at each position, `Reference` keeps the most
probable tokens, the mass of all others (the tail), and some tokens drawn from the tail. The rest is the other model's.
dev/decisions/0032-divergence.md compares this with kept hidden states and with the most probable tokens alone.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float32, Float64, Int, Int32
from torch import Tensor

from wanda_dvc.engine.accelerator import solving_device
from wanda_dvc.engine.decoder import Decoder, States
from wanda_dvc.engine.sequences import Hidden, TokenSequence
from wanda_dvc.reading import DIVERGED

TOP = 64  # the most probable tokens of a position
DRAWN = 64  # tokens drawn from its tail, with replacement
BYTES_A_TOKEN = 8 * (TOP + DRAWN) + 3 * 4  # of a reference, at most
# Log-probabilities at a time, by kind of device: few, so that they stay in a core's cache; many, to fill a GPU.
AT_A_TIME = {"cpu": 2**20, "cuda": 2**24}
TEMPORARIES = 24  # bytes for each of those, at most: exponentials, float64 sums
LogP = Float32[Tensor, "positions vocabulary"]
Targets = Int[Tensor, " positions"]
Chosen = Int32[Tensor, "positions _"]  # some tokens of each position


class Reference(NamedTuple):
    """The dense model's predictions of one window, a row for each predicted token. Log-probabilities are in nats."""

    top: Int32[Tensor, "predictions top"]  # tokens
    drawn: Int32[Tensor, "predictions drawn"]  # tokens of the tail; none if the vocabulary has no tail
    top_log_p: Float32[Tensor, "predictions top"]
    tail_log_p: Float32[Tensor, " predictions"]  # of all other tokens together
    drawn_log_p: Float32[Tensor, "predictions drawn"]
    first: Int32[Tensor, " predictions"]  # the most probable token, of equals the lowest id
    true_log_p: Float32[Tensor, " predictions"]  # of the text's own next token


class Divergence(NamedTuple):
    """A model against the dense model, on one window."""

    kl: list[float]  # KL(dense ‖ model) of each prediction, in nats, to six significant digits
    agreed: int  # predictions with the same most probable token
    squared_change: float  # Σ (p − q)² of the true tokens' probabilities

    @property
    def finite(self) -> bool:
        """Whether all numbers are finite."""
        return all(map(math.isfinite, (*self.kl, self.squared_change)))


# --- one window ---


def measure_windows(
    decoder: Decoder, rows: Sequence[TokenSequence], hidden: Hidden, dense: Sequence[Reference | None]
) -> Iterator[tuple[float, Reference | Divergence]]:
    """Yield the results of `measure` for the windows of a shard; `dense` has the reference of each."""
    for row, states, one in zip(rows, hidden, dense, strict=True):
        yield measure(decoder, states[None], row.tokens, one)


def measure(
    decoder: Decoder, hidden: States, tokens: Int[Tensor, " length"], dense: Reference | None = None
) -> tuple[float, Reference | Divergence]:
    """Return a model's mean loss on a window, and its divergence from a reference, or its own reference.

    `hidden` are the hidden states after the last block. The results are on the host.
    """
    # The offset of each position's draw; each window has the same, so that no order of windows matters.
    offsets = torch.rand(len(tokens), generator=torch.Generator().manual_seed(0)).double()
    losses, parts, place = [], list[tuple[Tensor, ...]](), 0
    tokens = tokens.to(decoder.device)
    for positions, logits in decoder.logits(hidden, tokens):
        targets = tokens[1:][positions.start : positions.stop]  # the last token predicts nothing
        log_p = logits[: len(targets)].float().log_softmax(-1)
        losses.append(torch.nn.functional.nll_loss(log_p, targets, reduction="sum"))
        where = solving_device(log_p.device)
        size = max(1, AT_A_TIME[where.type] // log_p.shape[1])
        for some, wanted in zip(log_p.to(where).split(size), targets.to(where).split(size), strict=True):
            own = slice(place, place + len(some))
            if dense is None:
                parts.append(_reference(some, wanted, offsets[own].to(where)))
            else:
                parts.append(_seen(some, wanted, dense.top[own].to(where), dense.drawn[own].to(where)))
            place = own.stop
        del logits, log_p, some  # before the next chunk's
    columns = [torch.cat(column).cpu() for column in zip(*parts, strict=True)]
    loss = float(sum(torch.stack(losses).tolist())) / place
    return loss, Reference(*columns) if dense is None else _from_reference(dense, columns)


def _reference(log_p: LogP, targets: Targets, offsets: Float64[Tensor, " positions"]) -> tuple[Tensor, ...]:
    """Return the parts of a reference, as `_seen`, after the choice of its tokens.

    The draw is systematic: the tail's cumulative distribution at equal steps from a random offset.
    """
    vocabulary = log_p.shape[1]
    top = log_p.topk(min(TOP, vocabulary), -1).indices
    p = log_p.exp().scatter_(-1, top, 0)
    cumulative = sums_by_doubling(p) if p.is_cuda else p.cumsum(-1, dtype=torch.float64)
    steps = torch.arange(DRAWN if vocabulary > TOP else 0, device=log_p.device)
    wanted = (steps + offsets[:, None]) / DRAWN * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, wanted, right=True).clamp_(max=vocabulary - 1).int()
    return top.int(), drawn, *_seen(log_p, targets, top.int(), drawn)


def sums_by_doubling(p: Float32[Tensor, "positions vocabulary"]) -> Float64[Tensor, "positions vocabulary"]:
    """Return each row's cumulative sums by doubling, for GPUs: CUDA's `cumsum` of floats is not deterministic."""
    sums, step = p.double(), 1
    while step < p.shape[1]:
        sums[:, step:] += sums[:, :-step].clone()
        step *= 2
    return sums


def _seen(log_q: LogP, targets: Targets, top: Chosen, drawn: Chosen) -> tuple[Tensor, ...]:
    """Return log-probabilities of the reference's top, tail and drawn tokens; the first token; the true one's.

    In `log_q` the top's entries become −∞.
    """
    first, true = log_q.argmax(-1), log_q.gather(-1, targets[:, None])[:, 0]
    of_top = log_q.gather(-1, top.long())
    tail = log_q.scatter_(-1, top.long(), -math.inf).logsumexp(-1)
    return of_top, tail, log_q.gather(-1, drawn.long()), first.int(), true


LogProbs = tuple[Tensor, Tensor, Tensor]  # log-probabilities: of the top, of the tail, of the drawn tokens


def _kl(dense: LogProbs, other: LogProbs) -> Float64[Tensor, " predictions"]:
    """Return an unbiased estimate of KL(p ‖ q) for each prediction. It is never negative, and 0 for equal parts.

    By the chain rule, KL is the divergence of top and tail, with the tail as one token, plus p(tail) times the
    divergence within the tail. The first is exact. The second is E[r − 1 − log r] over tokens drawn from p's tail, with
    r = (q / q(tail)) / (p / p(tail)): no term is negative, and E[r − 1] = 0 (Schulman's k3,
    http://joschu.net/blog/kl-approx.html). Without a tail the result is exact.
    """
    (p_top, p_tail, p_drawn), (q_top, q_tail, q_drawn) = map(_normalized, (dense, other))
    log_p, log_q = torch.cat([p_top, p_tail], -1), torch.cat([q_top, q_tail], -1)
    p = log_p.exp()
    coarse = torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1).clamp_(min=0)  # rounding may give −1e-17
    if not p_drawn.shape[1]:
        return coarse
    log_r = (q_drawn - q_tail) - (p_drawn - p_tail)
    # A tail that is 0 in float32 has nothing to draw.
    within = torch.where(p_drawn.isneginf(), 0.0, log_r.expm1() - log_r).mean(-1)
    return coarse + torch.where(p[:, -1] == 0, 0.0, p[:, -1] * within)


def _normalized(parts: LogProbs) -> LogProbs:
    """Return log-probabilities in float64, the tail's as a column, so that top and tail sum to 1."""
    top, tail, drawn = (x.double() for x in parts)
    total = torch.cat([top, tail[:, None]], -1).logsumexp(-1, keepdim=True)
    return top - total, tail[:, None] - total, drawn - total


def _from_reference(dense: Reference, seen: list[Tensor]) -> Divergence:
    """Return the divergence of a model from the dense model, by the tensors that `_seen` returns, for all positions."""
    top, tail, drawn, first, true = seen
    kl = _kl((dense.top_log_p, dense.tail_log_p, dense.drawn_log_p), (top, tail, drawn))
    change = dense.true_log_p.double().exp() - true.double().exp()
    rounded = [float(f"{value:.6g}") for value in kl.tolist()]
    return Divergence(rounded, int((first == dense.first).sum()), float((change**2).sum()))


# --- all windows ---


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


def summarize(windows: Sequence[Divergence]) -> dict[str, Any]:
    """Return the measures over all windows, as metrics; `diverged` in place of all if one number is not finite.

    A percentile is the smallest value with that fraction of the predictions at or below it.
    """
    if not all(window.finite for window in windows):
        return {"divergence": DIVERGED, "top1_agreement": DIVERGED, "rms_probability_change": DIVERGED}
    values = sorted(value for window in windows for value in window.kl)
    count = len(values)
    divergence = {
        "mean": _mean([math.fsum(window.kl) / len(window.kl) for window in windows], windows),
        "median": values[math.ceil(0.5 * count) - 1],
        "p99": values[math.ceil(0.99 * count) - 1],
        "largest": values[-1],
    }
    agreement = {"mean": _mean([window.agreed / len(window.kl) for window in windows], windows)}
    change = math.sqrt(math.fsum(window.squared_change for window in windows) / count)
    return {
        "divergence": {name: float(f"{value:.6g}") for name, value in divergence.items()},
        "top1_agreement": {name: float(f"{value:.6g}") for name, value in agreement.items()},
        "rms_probability_change": float(f"{change:.6g}"),
    }


def _mean(means: Sequence[float], windows: Sequence[Divergence]) -> float:
    """Return the mean over predictions, from the windows' means."""
    counts = [len(window.kl) for window in windows]
    return math.fsum(mean * count for mean, count in zip(means, counts, strict=True)) / sum(counts)
