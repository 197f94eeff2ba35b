"""Readers of what others wrote, and of unfinished work, on damaged files: a UserError, or a result; never a crash.

The files in corpus/ are kept: one that is right for each reader, and every damaged one that a run has found. With
WANDA_DVC_NEW_EXAMPLES, as each night, the date draws others, and more of them.
"""

import json
import os
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from wanda_dvc.engine.checkpoint import Checkpoint, read_config, read_index
from wanda_dvc.errors import UserError
from wanda_dvc.params import read_params
from wanda_dvc.reading import read_header, read_lines, read_object
from wanda_dvc.study.artifact import file_digest
from wanda_dvc.study.files import open_documents

CORPUS = Path(__file__).parent / "corpus"
NEW = bool(os.environ.get("WANDA_DVC_NEW_EXAMPLES"))


def documents(path: Path) -> None:
    list(open_documents(path, "text", file_digest(path)))


def checkpoint(path: Path) -> None:
    (path.parent / "config.json").write_text("{}")
    opened = Checkpoint(path.parent)
    for name in opened.file_of:
        assert opened.entries[name].length >= 0


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {  # name of the file, what reads it
    "object": ("file.json", read_object),
    "lines": ("items.jsonl", lambda path: list(read_lines(path))),
    "index": ("model.safetensors.index.json", read_index),
    "header": ("file.safetensors", read_header),
    "checkpoint": ("model.safetensors", checkpoint),
    "params": ("params.yaml", read_params),
    "documents": ("documents.json.gz", documents),
    "config": ("config.json", lambda path: read_config(path.parent)),
}

ODD: list[Any] = [
    None, True, 0, -1, 1, 3, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, float("inf"), float("nan"), "", "x", "..",
    "/etc/passwd", "\ud800", "a\0b", "a\nb", "é", "F32", "I8", [], [1], [[]], {}, {"a": 1}, [0, 2**62], ["x"],
]  # fmt: skip
PIECES = [
    b"", b"null", b"-1", b"1e999", b"[]", b"{}", b'"', b"\\", b"\\ud800", b"\xff", b"\0", b"\n", b"\r", b"\xe2\x80\xa8",
    b"\xef\xbb\xbf", b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"\xff" * 8,
    b"\x00" * 8, b"&a", b"*a", b"!!python/none",
]  # fmt: skip


def places(content: object, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value of a JSON document."""
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [at, *(place for key, value in inside for place in places(value, (*at, key)))]


def replaced(content: Any, place: tuple[Any, ...], value: object) -> Any:
    if not place:
        return value
    key, *rest = place
    content = dict(content) if isinstance(content, dict) else list(content)
    content[key] = replaced(content[key], tuple(rest), value)
    return content


@st.composite
def damaged(draw: st.DrawFn, originals: list[bytes]) -> bytes:
    """A file of the corpus with a few values, bytes or lengths changed."""
    content = draw(st.sampled_from(originals))
    size = int.from_bytes(content[:8], "little")
    prefix = 8 if content[8:9] == b"{" and size <= len(content) - 8 else 0  # a safetensors file
    text, rest = (content[8 : 8 + size], content[8 + size :]) if prefix else (content, b"")
    for _ in range(draw(st.integers(0, 3))):
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            break
        place = draw(st.sampled_from(places(document)))
        try:
            text = json.dumps(replaced(document, place, draw(st.sampled_from(ODD)))).encode()
        except (ValueError, KeyError, IndexError):
            break
    content = len(text).to_bytes(8, "little") + text + rest if prefix else text
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(content)))
        removed = draw(st.sampled_from([0, 0, 1, 1, 2, 8, 64, len(content)]))
        content = content[:at] + draw(st.sampled_from(PIECES) | st.binary(max_size=4)) + content[at + removed :]
    return content


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_refused_or_read(reader: str, tmp_path: Path):
    name, read = READERS[reader]
    kept = sorted((CORPUS / reader).iterdir())
    assert kept, "the corpus has no file of this reader"

    taken = 0

    def check(content: bytes) -> None:
        nonlocal taken
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            path = Path(folder, name)
            path.write_bytes(content)
            try:
                taken += read(path) != []
            except UserError as error:
                assert str(error).strip()  # noqa: PT017 - it may also be read

    originals = [path.read_bytes() for path in kept]
    for content in originals:
        check(content)
    assert taken, "the corpus has no file that this reader takes"
    drawn = settings(max_examples=3000 if NEW else 60, database=None)(given(damaged(originals))(check))
    seed(date.today().toordinal() if NEW else 0)(drawn)()
