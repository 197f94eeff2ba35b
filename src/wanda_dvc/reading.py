"""Readers of outside files: text, JSON, lines of JSON, and headers of safetensors files.

Any problem of a file raises a UserError: *where: found, expected, what to do*. No reader runs a file's content.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from wanda_dvc.errors import UserError

COPY = "copy it again"
DIVERGED = "diverged"  # replaces a non-finite perplexity or loss: JSON has no such number
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # in JSON's escaped form, also a complete pair


def check_file(path: Path, todo: str = COPY) -> None:
    """Raise UserError unless a path is a file, or a link to one. OSError, which is explained, if it is not readable."""
    if not (is_there(path) and path.is_file()):  # `is_file` hides a closed folder from Python 3.14 on
        raise UserError(f"{path}: missing or not a file, expected a file; {todo}")
    path.open("rb").close()


def is_there(path: Path) -> bool:
    """Whether a path exists, also as a dangling link. OSError, which is explained, if its folder is not readable."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def check_place(path: Path, todo: str = "name another") -> Path:
    """Return the absolute path of a directory to write, new or existing. UserError if no directory can be there.

    It makes a directory there and removes it: `os.access` says that root may write where no file can be made.
    """
    path = path.absolute()
    is_there(Path(f"{path}.part"))  # the longest name that is written
    nearest = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
    try:
        Path(tempfile.mkdtemp(prefix=".wanda-dvc-", dir=nearest)).rmdir()
    except OSError:
        problem = f"{nearest} is no directory with permission to write, expected one"
        raise UserError(f"{path}: {problem}; {todo}") from None
    return path


def read_text(path: Path, todo: str = "convert it to UTF-8") -> str:
    """Read a text in UTF-8, with its line ends and without a byte order mark."""
    check_file(path, todo)
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is no UTF-8, expected text in UTF-8; {todo}") from None


def parse_json(text: str | bytes, where: str, todo: str = COPY) -> dict[str, Any]:
    """Parse a JSON object. UserError if it is not valid, nested too deeply, or has half a surrogate pair."""
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        content = json.loads(text)
        if SURROGATE.search(text):
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: found no JSON ({error}), expected JSON; {todo}") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: found {content!r:.40}, expected a JSON object; {todo}")
    return content


def read_object(path: Path, todo: str = COPY) -> dict[str, Any]:
    """Read a JSON object."""
    return parse_json(read_text(path, todo), str(path), todo)


def read_lines(path: Path, todo: str = "correct that line") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the object of every line of a JSONL file. Only line feeds end a line, not U+2028."""
    lines = read_text(path).rstrip(" \t\r\n").split("\n")
    for number, line in enumerate(lines if lines != [""] else [], start=1):
        where = f"{path}: line {number}"
        yield where, parse_json(line, where, todo)


class Entry(NamedTuple):
    """A tensor's entry in the header of its file: dtype, shape, first byte in the file and length."""

    dtype: str
    shape: list[int]
    begin: int
    length: int


def read_header(path: Path) -> dict[str, Entry]:
    """Read the header of a safetensors file: its tensors by name. UserError if the library refuses the file."""
    from safetensors import SafetensorError, safe_open

    check_file(path)
    try:
        safe_open(path, framework="np")  # it checks that header and data belong together
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged ({error}), expected a safetensors file; {COPY}") from None
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
    header.pop("__metadata__", None)
    entries = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        entries[name] = Entry(entry["dtype"], entry["shape"], start + begin, end - begin)
    return entries
