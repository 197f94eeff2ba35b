"""The palette of all pictures and pages: Okabe and Ito's, dark enough for text; lighter in dark mode."""

COLOURS = {  # light, dark
    "paper": ("#ffffff", "#161616"),
    "shade": ("#f3f3f3", "#2a2d33"),
    "ink": ("#1a1a1a", "#e8e8e8"),
    "muted": ("#6b6b6b", "#a0a0a0"),
    "line": ("#d5d5d5", "#404040"),
    "blue": ("#0072b2", "#56b4e9"),
    "orange": ("#d55e00", "#ff8c42"),
    "green": ("#007a5a", "#2fc39a"),
    "pink": ("#b4568c", "#e08fc0"),
    "yellow": ("#8a6d00", "#f0c94a"),
    "sky": ("#3f93c4", "#9ad4f5"),
}
SERIES = ("blue", "orange", "green", "pink", "yellow", "sky")  # in the order of a picture's series
LIGHT, DARK = ({name: pair[mode] for name, pair in COLOURS.items()} for mode in (0, 1))


def css() -> str:
    """Return the palette as CSS custom properties for a page or an SVG file, for light and dark mode."""
    properties = "".join(f"--{name}:light-dark({light},{dark});" for name, (light, dark) in COLOURS.items())
    return f":root{{color-scheme:light dark;{properties}}}@media print{{:root{{color-scheme:light}}}}"
