"""Patterns of neighbours: the allowed positions of zeros."""

from wanda_dvc.errors import SettingError


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """Return (2, 4) for `"2:4"`: 2 of every 4 neighbours stay. None for a pattern without neighbours."""
    n, colon, m = pattern.partition(":")
    return (int(n), int(m)) if colon else None


def check_pattern(pattern: str, inputs: dict[str, int]) -> None:
    """Raise SettingError where a linear's number of inputs is no multiple of m."""
    if n_of_m := parse_pattern(pattern):
        odd = [f"{name} has {size} inputs" for name, size in inputs.items() if size % n_of_m[1]]
        if odd:
            more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
            raise SettingError(
                f"pattern: got {pattern}, but {odd[0]}{more}, expected a multiple of {n_of_m[1]}; choose another m"
            )
