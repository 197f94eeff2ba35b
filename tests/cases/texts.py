"""Text files that `download calibration` must refuse, and some that it must take."""

import gzip
from collections.abc import Iterator
from typing import Any

from cases import Case, replaced_by_folder, replaced_by_link, replaced_by_pipe, written

LINES, TEXT, SHARD = "text.jsonl", "text.txt", "c4-train.00000-of-01024.json.gz"
GOOD = b'{"text": "a"}\n'

# Files that are right, and the text that they hold.
RIGHT: dict[str, tuple[str, bytes, str]] = {
    "U+2028 inside a string": (LINES, '{"text": "a\u2028b"}\n'.encode(), "a\u2028b"),
    "U+0085 inside a string": (LINES, '{"text": "a\x85b"}\n'.encode(), "a\x85b"),
    "an escaped form feed": (LINES, b'{"text": "a\\fb\\u001cc"}\n', "a\fb\x1cc"),
    "a byte order mark": (LINES, b"\xef\xbb\xbf" + GOOD, "a"),
    "a byte order mark before text": (TEXT, b"\xef\xbb\xbfa", "a"),
    "several blank last lines": (LINES, GOOD + b" \r\n\n\t\n", "a"),
    "no last line feed": (LINES, GOOD.rstrip(), "a"),
    "carriage returns": (LINES, b'{"text": "a"}\r\n{"text": "b"}\r\n', "a b"),
    "a whole surrogate pair": (LINES, b'{"text": "\\ud83d\\ude00"}\n', "\U0001f600"),
    "a large number beside it": (LINES, b'{"text": "a", "n": 123456789012345678901234567890}\n', "a"),
    "line ends of other systems": (TEXT, b"a\r\nb\rc\n", "a\r\nb\rc\n"),
    "a form feed in text": (TEXT, "a\fb\x85c".encode(), "a\fb\x85c"),
}


def cases() -> Iterator[Case]:
    for name, (content, *words) in DAMAGED.items():
        file = LINES if name.startswith("jsonl") else SHARD if name.startswith("gz") else TEXT
        yield Case(name, written(file, content), tuple(words))
    for name in (LINES, TEXT):
        yield Case(f"{name}: a folder", replaced_by_folder(name), (name, "not a file", "expected a file"))
        yield Case(f"{name}: a pipe", replaced_by_pipe(name), (name, "no file and no directory", "expected one"))
        yield Case(f"{name}: a dangling link", replaced_by_link(name), (name, "not found", "expected"))
        yield Case(f"{name}: a link to itself", replaced_by_link(name, name), (name, "not found", "expected"))
        yield Case(f"{name}: not there", lambda _: None, (name, "not found", "expected"))
    yield Case("gz: a folder", replaced_by_folder(SHARD), (SHARD, "not a file", "expected a file"))
    yield Case("gz: a pipe", replaced_by_pipe(SHARD), (SHARD, "not a file", "expected a file"))


def gz(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


PACKED = gz(GOOD * 20)
DAMAGED: dict[str, Any] = {
    "jsonl: no JSON": (GOOD + b"{", f"{LINES}: line 2", "found no JSON", "expected"),
    "jsonl: text is 3": (GOOD + b'{"text": 3}\n', f"{LINES}: line 2", "found text, expected text in column `text`"),
    "jsonl: another column": (b'{"body": "a"}', "line 1", "found body", "expected text in column `text`"),
    "jsonl: no column": (b"{}", "line 1", "found nothing", "expected text in column `text`"),
    "jsonl: a blank line": (GOOD + b"\n" + GOOD, f"{LINES}: line 2", "found no JSON", "expected"),
    "jsonl: Latin-1": (b'{"text": "\xe9"}', LINES, "byte 10 is no UTF-8", "expected"),
    "txt: Latin-1": (b"caf\xe9", TEXT, "byte 3 is no UTF-8", "expected text in UTF-8"),
    "gz: not packed": (GOOD, SHARD, "damaged", "expected lines of JSON, gzipped"),
    "gz: half a file": (PACKED[:-9], SHARD, "damaged", "expected lines of JSON, gzipped"),
    "gz: a wrong sum": (PACKED[:-8] + b"\0" * 8, SHARD, "damaged", "expected lines"),
    "gz: a flipped byte": (PACKED[:14] + b"\xff\xff" + PACKED[16:], SHARD, "damaged", "expected"),
    "gz: empty": (gz(b""), SHARD, "damaged", "expected lines of JSON, gzipped"),
    "gz: another column": (gz(b'{"body": "a"}\n'), SHARD, "found body", "expected text in column `text`"),
    "gz: no text": (gz(GOOD + b'{"text": null}\n' * 2 + GOOD), SHARD, "found", "expected text in column `text`"),
    "gz: no JSON": (gz(b"{"), SHARD, "damaged (JSON parse error: ", "in row 0"),
}
