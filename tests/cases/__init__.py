"""Damaged and odd input as data: what is spoiled, and what the message must say."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Case:
    """One input. `spoil` damages a folder that is right; `says` are parts of the message: where, found, expected."""

    name: str
    spoil: Callable[[Path], object]
    says: tuple[str, ...]


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return spoil


def written(name: str, content: bytes | str) -> Callable[[Path], object]:
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    return replaced(name, lambda path: path.write_bytes(data))


def removed(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def replaced_by_folder(name: str) -> Callable[[Path], object]:
    return replaced(name, Path.mkdir)


def replaced_by_pipe(name: str) -> Callable[[Path], object]:
    """Put a pipe in a file's place: whoever opens it waits for ever."""
    return replaced(name, os.mkfifo)


def replaced_by_link(name: str, target: str = "nowhere") -> Callable[[Path], object]:
    return replaced(name, lambda path: path.symlink_to(target))


# What is no document of ours, whatever file it stands in, and the words that tell it.
NO_OBJECTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "found no JSON"), "half": (b'{"a": ', "found no JSON"), "null": (b"null", "found None"),
    "words": (b"not JSON at all", "found no JSON"), "binary": (b"\x80\x04\x95\xff\xfe\x00", "is no UTF-8"),
    "a number": (b"1", "found 1"), "text": (b'"a"', "found 'a'"), "a list": (b"[1, 2]", r"found \[1, 2]"),
    "true": (b"true", "found True"), "deep": (b"[" * 100_000, "found no JSON"),
    "deep objects": (b'{"a":' * 100_000, "found no JSON"),
    "a huge number": (b'{"a": ' + b"1" * 5000 + b"}", "found no JSON"),
    "half a surrogate pair": (b'{"a": "\\ud800"}', "found no JSON"),
}  # fmt: skip


def dotted(content: dict[str, Any], name: str, value: object) -> dict[str, Any]:
    """A document with another value at a dotted key; `REMOVED` takes the key out."""
    first, _, rest = name.partition(".")
    if rest:
        return content | {first: dotted(content.get(first, {}), rest, value)}
    return {key: found for key, found in content.items() if key != first} | ({} if value is REMOVED else {first: value})


REMOVED = object()
