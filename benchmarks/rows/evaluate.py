"""Rows of what it takes to evaluate a model: perplexity and zero-shot."""

from comparisons import as_timed, at_speed_of, furthest_apart, needed_floor, of_stock, other_answers, pass_floor
from measures import Bench
from results import Measured

TOLERANCE = 1e-3  # of a log-likelihood in float32; in bfloat16, how far stock's own are from its own in float32


def perplexity(bench: Bench, dtype: str) -> Measured:
    """`perplexity` against the floor."""
    done = bench.perplexity(dtype)
    floor = pass_floor(done["floor"], bench.sizes.windows, bench.sizes.length, head=True)
    return Measured(floor / done["seconds"], done["seconds"], floor, "inside")


def _items(bench: Bench, dtype: str) -> int:
    return sum(map(len, bench.zero_shot(dtype)["loglikelihoods"].values()))


def zero_shot_against_stock(bench: Bench, dtype: str) -> Measured:
    """`zero-shot` against (b)."""
    ours, stock = bench.zero_shot(dtype), bench.stock(dtype)
    base = at_speed_of(ours, stock, "seconds")
    note = (
        f"inside; {_items(bench, dtype)} items in {len(bench.sizes.tasks)} tasks, stock at batch {stock['batch']}; "
        f"whole processes {ours['wall']:.0f} s and {stock['wall']:.0f} s; {as_timed(stock, 'seconds')}"
    )
    return Measured(base / ours["seconds"], ours["seconds"], base, note)


def zero_shot(bench: Bench, dtype: str) -> Measured:
    """`zero-shot` against the floor of the tokens that the questions need."""
    ours = bench.zero_shot(dtype)
    floor, tokens = needed_floor(ours["floor"], bench.stock(dtype))
    return Measured(floor / ours["seconds"], ours["seconds"], floor, f"inside; {tokens} tokens are needed")


def zero_shot_answers(bench: Bench, dtype: str) -> Measured:
    """How many items `zero-shot` and (b) answer differently."""
    stock, tolerance = bench.stock(dtype), TOLERANCE
    if dtype != "float32":
        tolerance = furthest_apart(of_stock(stock), of_stock(bench.stock("float32")))
    others, close, furthest = other_answers(bench.zero_shot(dtype), stock, tolerance)
    note = (
        f"{others} of {_items(bench, dtype)}; {close} more within {tolerance:.3g}; "
        f"log-likelihoods differ by ≤ {furthest:.2g}"
    )
    return Measured(others, note=note)
