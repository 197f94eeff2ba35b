"""Strict readers of outside files: text, JSON, lines of JSON, and headers of safetensors files.

Any problem of a file raises a UserError: *where: found, expected, what to do*. No reader follows a path out of the
file's folder, or runs its content.
"""

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from wanda_dvc.errors import UserError

COPY = "copy it again"
DIVERGED = "diverged"  # replaces a non-finite perplexity or loss: JSON has no such number
LARGEST_HEADER = 100_000_000  # bytes, as the safetensors library has it
# Bytes a number, by safetensors' name; without types of less than a byte, which the project does not use.
DTYPES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8,
}  # fmt: skip
KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}  # fmt: skip
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # in JSON's escaped form, also a complete pair
NAMES = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}


# --- files ---


def check_file(path: Path, todo: str = COPY) -> os.stat_result:
    """Return the status of a readable ordinary file, or of a link to one. UserError for anything else.

    Not all libraries that open the file later distinguish a missing permission from a missing file.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise UserError(f"{path}: a link to {path.readlink()}, which is missing; {todo}") from None
        raise UserError(f"{path}: missing, expected a file; {todo}") from None
    except (OSError, ValueError) as error:  # no permission, circular links, an invalid name
        raise _unreadable(path, error) from None
    if not stat.S_ISREG(status.st_mode):
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "no file")
        raise UserError(f"{path}: found {kind}, expected a file; {todo}")
    try:
        path.open("rb").close()
    except OSError as error:
        raise _unreadable(path, error) from None
    return status


def is_there(path: Path) -> bool:
    """Whether a path exists, also as a dangling link. UserError if the folder is not readable."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    return True


def check_place(path: Path) -> Path:
    """Return the absolute path of a directory to write, new or existing. UserError if no directory can be there."""
    try:
        path = path.absolute()
        path.with_name(f"{path.name}.part").lstat()  # the longest name that is written
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # too long, circular links, an invalid name, no permission
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UserError(f"{path}: {reason}, expected a path for new files; name another") from None
    nearest = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
    if not nearest.is_dir():
        found = "a dangling link" if nearest.is_symlink() and not nearest.exists() else "a file"
        where = "" if nearest == path else f"{nearest} is "
        raise UserError(f"{path}: {where}{found}, expected a directory; name another")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{path}: no permission to write in {nearest}; change it, or name another")
    return path


def read_bytes(path: Path, todo: str = COPY) -> bytes:
    """Read a complete file."""
    check_file(path, todo)
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None


def read_text(path: Path, todo: str = "convert it to UTF-8") -> str:
    """Read a text in UTF-8, with its line ends and without a byte order mark."""
    try:
        return read_bytes(path, todo).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is no UTF-8, expected text in UTF-8; {todo}") from None


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return UserError(f"{path}: {reason}, expected a file that may be read; change its permissions or name another")


# --- JSON ---


def parse_json(text: str | bytes, where: str, todo: str = COPY) -> Any:
    """Parse JSON. UserError if it is invalid, or has a text or number that the project never writes."""
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        content = json.loads(text)
        if SURROGATE.search(text):
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise UserError(f"{where}: nested too deeply, expected JSON of a few levels; {todo}") from None
    except UnicodeEncodeError:
        raise UserError(f"{where}: found half a surrogate pair (\\ud800 to \\udfff), expected text; {todo}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start} is no UTF-8, expected JSON; {todo}") from None
    except ValueError as error:  # includes numbers with too many digits for Python
        raise UserError(f"{where}: found no JSON ({error}), expected JSON; {todo}") from None
    return content


def yaml_problem(error: Exception) -> str:
    """Return a YAML library's error as one line: the place and the problem, without the library's advice."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}: {problem}" if problem and mark else " ".join(str(error).split())


WORDS = {  # of pydantic, and in our messages
    "Input should be": "expected",
    "String should": "expected text that should",
    "List should": "expected a list that should",
    "Field required": "missing, expected a value",
}


def problems_of(error: Any, where: str, todo: str) -> Iterator[str]:
    """Yield the problems of pydantic's ValidationError for a document, as lines."""
    for problem in error.errors():
        field = ".".join(map(str, problem["loc"]))
        message = problem["msg"].removeprefix("Value error, ")
        for words, ours in WORDS.items():
            message = message.replace(words, ours)
        found = "" if problem["type"] in ("missing", "value_error") else f" found {problem['input']!r:.60},"
        yield f"{where}:{f' {field}:' if field else ''}{found} {message}; {todo}"


def read_object(path: Path, todo: str = COPY) -> dict[str, Any]:
    """Read a JSON object."""
    return expect_object(parse_json(read_text(path, todo), str(path), todo), str(path), todo)


def expect_object(content: object, where: str, todo: str = COPY) -> dict[str, Any]:
    """Return a JSON object. UserError for any other value."""
    if not isinstance(content, dict):
        raise UserError(f"{where}: found {name_of(content)}, expected an object; {todo}")
    return content


def name_of(content: object) -> str:
    """Return the name of a JSON value's type, for messages."""
    return NAMES.get(type(content), "a number")


def read_lines(path: Path, todo: str = "correct that line") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the object of every line of a JSONL file.

    Only a line feed ends a line: U+2028, U+0085 and form feeds may occur inside a string. Blank lines at the end do not
    count.
    """
    lines = read_text(path).rstrip(" \t\r\n").split("\n")
    for number, line in enumerate(lines if lines != [""] else [], start=1):
        where = f"{path}: line {number}"
        yield where, expect_object(parse_json(line, where, todo), where, todo)


# --- safetensors ---


class Entry(NamedTuple):
    """A tensor's entry in the header of its file: dtype, shape, first byte in the file and length."""

    dtype: str
    shape: list[int]
    begin: int
    length: int


def read_header(path: Path, todo: str = COPY) -> dict[str, Entry]:
    """Read the header of a safetensors file: its tensors by name. UserError if the file is incomplete."""
    size = check_file(path, todo).st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LARGEST_HEADER):
                found = f"{size} bytes and a header of {length}" if size >= 8 else f"{size} bytes"
                raise UserError(f"{path}: incomplete safetensors file: found {found}, expected header and data; {todo}")
            text = file.read(length)
    except OSError as error:
        raise _unreadable(path, error) from None
    where = f"{path}: header"
    header = expect_object(parse_json(text, where, todo), where, todo)
    header.pop("__metadata__", None)
    entries = {name: _entry(entry, f"{where}: {name}", todo) for name, entry in header.items()}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].length)):
        if entry.begin != end:
            raise UserError(f"{where}: {name} begins at byte {entry.begin}, expected {end}; {todo}")
        end += entry.length
    if 8 + length + end != size:
        raise UserError(
            f"{path}: incomplete safetensors file: found {size} bytes, expected {8 + length + end} by its header; "
            f"{todo}"
        )
    return {name: entry._replace(begin=8 + length + entry.begin) for name, entry in entries.items()}


def _entry(content: object, where: str, todo: str) -> Entry:
    """Check a tensor's entry; `begin` counts from the end of the header."""
    entry = expect_object(content, where, todo)
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str):
        raise UserError(f"{where}: found {name_of(dtype)} as dtype, expected a name such as F32; {todo}")
    if not _are_sizes(shape):
        raise UserError(f"{where}: found {str(shape)[:60]} as shape, expected a list of sizes; {todo}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise UserError(
            f"{where}: found {str(offsets)[:60]} as data_offsets, expected the first byte and the end; {todo}"
        )
    begin, end = offsets
    if dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype]:
        expected = math.prod(shape) * DTYPES[dtype]
        raise UserError(f"{where}: found {end - begin} bytes, expected {expected} for {dtype} {shape}; {todo}")
    return Entry(dtype, shape, begin, end - begin)


def _are_sizes(content: Any) -> bool:
    valid = isinstance(content, list) and all(type(size) is int and 0 <= size < 2**63 for size in content)
    return valid and len(content) <= 64
