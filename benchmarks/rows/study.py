"""Rows of a whole study, composed of the processes that other rows measure."""

from comparisons import at_speed_of
from measures import Bench
from results import Measured

PRUNES, EVALUATIONS = 3, 7  # prunes by each of two methods; the dense model is evaluated too


def study(bench: Bench, dtype: str) -> Measured:
    """Three Wanda and three magnitude prunes and seven evaluations, against (a) and (b) in float32."""
    base = PRUNES * (at_speed_of(bench.calibrate("float32"), bench.plain("wanda")) + bench.plain("magnitude")["wall"])
    losses = at_speed_of(bench.perplexity("float32"), bench.plain("perplexity"))
    base += EVALUATIONS * (losses + at_speed_of(bench.zero_shot("float32"), bench.stock("float32")))
    ours = bench.calibrate(dtype)["wall"]
    ours += PRUNES * sum(bench.mask_and_apply(dtype, method)["wall"] for method in ("wanda", "magnitude"))
    ours += EVALUATIONS * (bench.perplexity(dtype)["wall"] + bench.zero_shot(dtype)["wall"])
    return Measured(base / ours, ours, base, "composed: 6 prunes, 7 evaluations, whole processes")
