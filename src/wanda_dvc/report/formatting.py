"""How the report writes numbers and settings; perplexities and text from outside as `study.markup` does."""

from collections.abc import Callable
from typing import Any

from wanda_dvc.report.inference import Estimate

DASH = "–"  # not measured, or not comparable


def seconds(value: float) -> str:
    """Seconds with one decimal, rounded to hundredths first so that the order of a sum does not matter."""
    return f"{round(value, 2):,.1f}"


def factor(value: float) -> str:
    """A ratio: three decimals below 10, none from 1,000 on."""
    if value < 10:
        return f"{value:.3f}"
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def percent(value: float | None) -> str:
    """A fraction in percent, without the sign %."""
    return DASH if value is None else f"{100 * value:.1f}"


def signed(value: float) -> str:
    """A difference of fractions in percentage points."""
    return f"{100 * value:+.1f}".replace("-", "−")


def interval(estimate: Estimate | None, shown: Callable[[float], str]) -> str:
    """The interval's two ends, each as `shown` writes it."""
    return f"{shown(estimate.low)} to {shown(estimate.high)}" if estimate else DASH


def setting(value: Any) -> str:
    """A parameter's value as plain text."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, str):
        return repr(value).strip("'") if value.strip() else repr(value)
    return "null" if value is None else f"{value}"
