"""Rows of what it takes to prune: calibrate, the first prune, mask."""

from comparisons import as_timed, at_speed_of, pass_floor
from measures import Bench
from results import Measured


def calibrate(bench: Bench, dtype: str) -> Measured:
    """`calibrate` against the floor."""
    done = bench.calibrate(dtype)
    floor = pass_floor(done["floor"], bench.sizes.samples, bench.sizes.length)
    linears, attention = done["floor"]["gflops_linears"], done["floor"]["gflops_attention"]
    note = f"inside; {linears:.0f} GFLOP/s in the linears, {attention:.0f} in attention"
    return Measured(floor / done["seconds"], done["seconds"], floor, note)


def first_prune(bench: Bench, dtype: str) -> Measured:
    """`calibrate`, `mask` and `apply` against (a)."""
    plain, calibrated = bench.plain("wanda"), bench.calibrate(dtype)
    base = at_speed_of(bench.calibrate("float32"), plain)
    ours = calibrated["wall"] + bench.mask_and_apply(dtype, "wanda")["wall"]
    peak = f"peak {calibrated['peak_gb']:.1f} against {plain['peak_gb']:.1f} GB"
    return Measured(base / ours, ours, base, f"calibrate, mask and apply; {peak}; {as_timed(plain)}")


def mask(bench: Bench) -> Measured:
    """The seconds of the stage `mask`."""
    seconds = bench.mask_and_apply("float32", "wanda")["mask"]
    return Measured(seconds, seconds, note="inside the stage, best of three")
