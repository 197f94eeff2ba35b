"""Where zeros may stand."""


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """`"2:4"` as (2, 4): 2 of every 4 neighbours stay. None for `"unstructured"`."""
    if pattern == "unstructured":
        return None
    n, m = pattern.split(":")
    return int(n), int(m)
