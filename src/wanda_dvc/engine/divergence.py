"""Measures a model's predictions of the next tokens: its loss, and its divergence from the dense model.

Complete distributions are too large to keep: dev/decisions/0032-divergence.md. `Predictions` has, at each position, the
dense model's most probable tokens, the mass of all others (the tail), and some tokens drawn from the tail.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float32, Float64, Int, Int32
from torch import Tensor

from wanda_dvc.engine.accelerator import float64_device
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.sequences import Hidden, States, TokenSequence
from wanda_dvc.reading import DIVERGED

TOP = 64  # the most probable tokens of a position
DRAWN = 64  # tokens drawn from its tail, with replacement
REFERENCE_BYTES = 8 * (TOP + DRAWN) + 2 * 4  # for each predicted token, at most
# Log-probabilities at a time, by kind of device: few, so that they stay in a core's cache; many, to fill a GPU.
AT_A_TIME = {"cpu": 2**20, "cuda": 2**24}
TEMPORARIES = 24  # bytes for each of those, at most: exponentials, float64 sums
LogP = Float32[Tensor, "positions vocabulary"]
TokenChoice = Int32[Tensor, "positions _"]  # some tokens of each position


class Predictions(NamedTuple):
    """A model's predictions of one window, at tokens that the dense model chose. Log-probabilities are in nats."""

    top: Int32[Tensor, "predictions top"]  # the dense model's most probable tokens
    drawn: Int32[Tensor, "predictions drawn"]  # tokens of its tail; none if the vocabulary has no tail
    top_log_p: Float32[Tensor, "predictions top"]
    tail_log_p: Float32[Tensor, " predictions"]  # of all tokens outside the top together
    drawn_log_p: Float32[Tensor, "predictions drawn"]
    first: Int32[Tensor, " predictions"]  # top-1: the model's most probable token, of equals the lowest id


class Divergence(NamedTuple):
    """A model against the dense model, on one window."""

    kl: list[float]  # KL(dense ‖ model) of each prediction, in nats, to six significant digits
    agreed: int  # predictions with the same most probable token

    @property
    def finite(self) -> bool:
        """Whether all numbers are finite."""
        return all(map(math.isfinite, self.kl))

    @property
    def mean(self) -> float:
        """The mean KL over predictions, in nats."""
        return math.fsum(self.kl) / len(self.kl)

    @property
    def agreement(self) -> float:
        """The fraction of predictions with the same most probable token."""
        return self.agreed / len(self.kl)


def measure_windows(
    decoder: Decoder, sequences: Sequence[TokenSequence], hidden: Hidden, references: Sequence[Predictions] = ()
) -> Iterator[tuple[float, Predictions]]:
    """Yield a model's mean loss and predictions of each window of a chunk; without references, the dense model's."""
    for window, (sequence, states) in enumerate(zip(sequences, hidden, strict=True)):
        yield measure(decoder, states[None], sequence.tokens, references[window] if references else None)


def measure(
    decoder: Decoder, hidden: States, tokens: Int[Tensor, " length"], dense: Predictions | None = None
) -> tuple[float, Predictions]:
    """Return a model's mean loss on a window, in nats, and its predictions on the host, from its last hidden states.

    Predictions are at the tokens that the dense model chose. Without `dense`, the model is the dense one, and chooses.
    """
    # The offset of each position's draw; each window has the same, so that no order of windows matters.
    offsets = torch.rand(len(tokens), generator=torch.Generator().manual_seed(0)).double()
    tokens = tokens.to(decoder.device)
    losses: list[Tensor] = []
    pieces: list[Predictions] = []
    measured = 0  # positions
    for positions, logits in decoder.logits(hidden, tokens):
        targets = tokens[1:][positions.start : positions.stop]  # the last token predicts nothing
        log_p = logits[: len(targets)].float().log_softmax(-1)
        losses.append(torch.nn.functional.nll_loss(log_p, targets, reduction="sum"))
        device = float64_device(log_p.device)
        size = max(1, AT_A_TIME[device.type] // log_p.shape[1])
        for piece in log_p.to(device).split(size):
            place = slice(measured, measured + len(piece))
            if dense is None:
                top, drawn = choose_tokens(piece, offsets[place].to(device))
            else:
                top, drawn = dense.top[place].to(device), dense.drawn[place].to(device)
            pieces.append(predictions_at(piece, top, drawn))
            measured = place.stop
        del logits, log_p, piece  # before the next positions'
    loss = float(sum(torch.stack(losses).tolist())) / measured
    columns = {name: torch.cat([getattr(piece, name) for piece in pieces]).cpu() for name in Predictions._fields}
    return loss, Predictions(**columns)


def choose_tokens(log_p: LogP, offsets: Float64[Tensor, " positions"]) -> tuple[TokenChoice, TokenChoice]:
    """Return each position's most probable tokens, and tokens drawn from its tail."""
    vocabulary = log_p.shape[1]
    top = log_p.topk(min(TOP, vocabulary), -1).indices
    p = log_p.exp().scatter_(-1, top, 0)
    cumulative = sums_by_doubling(p) if p.is_cuda else p.cumsum(-1, dtype=torch.float64)
    # The draw is systematic: at equal steps from a random offset.
    steps = torch.arange(DRAWN if vocabulary > TOP else 0, device=log_p.device)
    quantiles = (steps + offsets[:, None]) / DRAWN * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, quantiles, right=True).clamp_(max=vocabulary - 1)
    return top.int(), drawn.int()


def sums_by_doubling(p: Float32[Tensor, "positions vocabulary"]) -> Float64[Tensor, "positions vocabulary"]:
    """Return each row's cumulative sums by doubling, for GPUs: CUDA's `cumsum` of floats is not deterministic."""
    sums, step = p.double(), 1
    while step < p.shape[1]:
        sums[:, step:] += sums[:, :-step].clone()
        step *= 2
    return sums


def predictions_at(log_p: LogP, top: TokenChoice, drawn: TokenChoice) -> Predictions:
    """Return a model's predictions at chosen tokens. In `log_p` the top's entries become −∞."""
    first = log_p.argmax(-1).int()
    top_log_p = log_p.gather(-1, top.long())
    tail_log_p = log_p.scatter_(-1, top.long(), -math.inf).logsumexp(-1)
    return Predictions(top, drawn, top_log_p, tail_log_p, log_p.gather(-1, drawn.long()), first)


def diverge(dense: Predictions, other: Predictions) -> Divergence:
    """Return the divergence of a model from the dense model, from both models' predictions of one window."""
    kl = [_six_digits(value) for value in kl_divergence(dense, other).tolist()]
    return Divergence(kl, int((other.first == dense.first).sum()))


def kl_divergence(dense: Predictions, other: Predictions) -> Float64[Tensor, " predictions"]:
    """Return an unbiased estimate of KL(p ‖ q) for each prediction. It is never negative, and 0 for equal models.

    By the chain rule, KL is the divergence of top and tail, with the tail as one token, plus p(tail) times the
    divergence within the tail. The first is exact. The second is E[r − 1 − log r] over tokens drawn from p's tail, with
    r = (q / q(tail)) / (p / p(tail)): no term is negative, and E[r − 1] = 0 (Schulman's k3,
    http://joschu.net/blog/kl-approx.html). Without a tail the result is exact.
    """
    p_top, p_tail, p_drawn = _normalized(dense)
    q_top, q_tail, q_drawn = _normalized(other)
    log_p, log_q = torch.cat([p_top, p_tail], -1), torch.cat([q_top, q_tail], -1)
    p = log_p.exp()
    coarse = torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1).clamp_(min=0)  # rounding may give −1e-17
    if not p_drawn.shape[1]:
        return coarse
    log_r = (q_drawn - q_tail) - (p_drawn - p_tail)
    # A tail that is 0 in float32 has nothing to draw.
    within = torch.where(p_drawn.isneginf(), 0.0, log_r.expm1() - log_r).mean(-1)
    return coarse + torch.where(p[:, -1] == 0, 0.0, p[:, -1] * within)


def _normalized(predictions: Predictions) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log-probabilities of top, tail and drawn tokens in float64, so that top and tail sum to 1."""
    top, tail = predictions.top_log_p.double(), predictions.tail_log_p.double()[:, None]
    total = torch.cat([top, tail], -1).logsumexp(-1, keepdim=True)
    return top - total, tail - total, predictions.drawn_log_p.double() - total


def compute_perplexity(losses: list[float], counts: list[int]) -> float | str:
    """Return exp(total loss / predictions), from each window's mean loss and number of predictions."""
    mean = math.fsum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    if not mean < math.log(torch.finfo(torch.float64).max):
        return DIVERGED
    return _six_digits(math.exp(mean))  # later digits vary by machine


def summarize(windows: Sequence[Divergence]) -> dict[str, Any]:
    """Return the measures over all windows, as metrics; `diverged` in place of all if one number is not finite."""
    if not all(window.finite for window in windows):
        return {"divergence": DIVERGED, "top1_agreement": DIVERGED}
    predictions = sum(len(window.kl) for window in windows)
    divergence = math.fsum(kl for window in windows for kl in window.kl) / predictions
    agreement = sum(window.agreed for window in windows) / predictions
    return {"divergence": {"mean": _six_digits(divergence)}, "top1_agreement": {"mean": _six_digits(agreement)}}


def _six_digits(value: float) -> float:
    return float(f"{value:.6g}")
