"""Places for new files that `init`, `export` and `report` must refuse: what is made in a folder, and the message."""

from collections.abc import Callable
from pathlib import Path

PLACES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "too long a name": (lambda root: root / ("x" * 300), "File name too long"),
    "too long for a .part": (lambda root: root / ("x" * 253), "File name too long"),
    "too long a path": (lambda root: root.joinpath(*["x" * 200] * 30), "File name too long"),
    "too long a folder": (lambda root: root / ("x" * 300) / "a", "File name too long"),
    "a null byte": (lambda root: root / "a\0b", "null byte"),
    "below a file": (lambda root: _file(root / "f") / "a", "is a file, expected a directory"),
    "far below a file": (lambda root: _file(root / "f") / "a/b/c", "is a file, expected a directory"),
    "below a dangling link": (lambda root: _link(root / "l", root / "nowhere") / "a", "is a dangling link"),
    "below a link to a file": (lambda root: _link(root / "l", _file(root / "f")) / "a", "is a file"),
    "below a link to itself": (lambda root: _link(root / "l", root / "l") / "a", "Too many levels of symbolic links"),
    "a dangling link": (lambda root: _link(root / "l", root / "nowhere"), "a dangling link"),
    "a link to a file": (lambda root: _link(root / "l", _file(root / "f")), "a file"),
    "a file": (lambda root: _file(root / "f"), "a file, expected a directory"),
    "below a device": (lambda _: Path("/dev/null/a"), "is a file, expected a directory"),
    "in proc": (lambda _: Path("/proc/self/fd/a\0"), "null byte"),
}


def _file(path: Path) -> Path:
    path.write_text("mine", encoding="utf-8")
    return path


def _link(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path
