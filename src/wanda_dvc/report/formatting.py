"""Formats numbers and settings for the report; `study.markup` formats perplexities and outside text."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from wanda_dvc.results.inference import Estimate

DASH = "–"  # not measured, or not comparable


def factor(value: float) -> str:
    """Format a ratio: three decimals below 10, no decimals from 1,000 on."""
    if value < 10:
        return f"{value:.3f}"
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def percent(value: float | None) -> str:
    """Format a fraction in percent, without the sign %."""
    return DASH if value is None else f"{100 * value:.1f}"


def signed(value: float) -> str:
    """Format a difference of fractions in percentage points."""
    return f"{100 * value:+.1f}".replace("-", "−")


def interval(estimate: Estimate | None, shown: Callable[[float], str]) -> str:
    """Format the interval's two ends with `shown`."""
    return f"{shown(estimate.low)} to {shown(estimate.high)}" if estimate else DASH


def setting(value: Any) -> str:
    """Format a parameter's value as plain text. Only the last part of a local path is shown."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, str):
        value = Path(value).name if Path(value).is_absolute() else value
        return value if value.strip() and value.isprintable() else repr(value)
    return "null" if value is None else f"{value}"


def distinct(value: Any, values: Iterable[Any]) -> str:
    """Format one of several values, as `setting`; of a local path more than the last part if another one has that."""
    text = setting(value)
    return text if all(other == value or setting(other) != text for other in values) else f"{value}"
