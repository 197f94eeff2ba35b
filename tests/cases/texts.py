"""Text files that `download calibration` must refuse, and some that it must take."""

import gzip
from collections.abc import Iterator

from cases import Case, replaced_by_folder, replaced_by_link, replaced_by_pipe, written

LINES, TEXT, SHARD = "text.jsonl", "text.txt", "c4-train.00000-of-01024.json.gz"
GOOD = b'{"text": "a"}\n'

# Files that are right, and the text that they hold.
RIGHT: dict[str, tuple[str, bytes, str]] = {
    "U+2028 inside a string": (LINES, '{"text": "a\u2028b"}\n'.encode(), "a\u2028b"),
    "U+2029 inside a string": (LINES, '{"text": "a\u2029b"}\n'.encode(), "a\u2029b"),
    "U+0085 inside a string": (LINES, '{"text": "a\x85b"}\n'.encode(), "a\x85b"),
    "an escaped form feed": (LINES, b'{"text": "a\\fb\\u001cc"}\n', "a\fb\x1cc"),
    "a byte order mark": (LINES, b"\xef\xbb\xbf" + GOOD, "a"),
    "a byte order mark before text": (TEXT, b"\xef\xbb\xbfa", "a"),
    "a blank last line": (LINES, GOOD + b"\n", "a"),
    "several blank last lines": (LINES, GOOD + b" \r\n\n\t\n", "a"),
    "no last line feed": (LINES, GOOD.rstrip(), "a"),
    "carriage returns": (LINES, b'{"text": "a"}\r\n{"text": "b"}\r\n', "a b"),
    "a whole surrogate pair": (LINES, b'{"text": "\\ud83d\\ude00"}\n', "\U0001f600"),
    "a large number beside it": (LINES, b'{"text": "a", "n": 123456789012345678901234567890}\n', "a"),
    "line ends of other systems": (TEXT, b"a\r\nb\rc\n", "a\r\nb\rc\n"),
    "a form feed in text": (TEXT, "a\fb\x85c".encode(), "a\fb\x85c"),
}


def cases() -> Iterator[Case]:
    yield Case("jsonl: no JSON", written(LINES, GOOD + b"{"), (f"{LINES}: line 2", "found no JSON", "expected"))
    for value, found in (
        ("3", "found text"), ("null", "found text"),
    ):  # fmt: skip
        line = f'{{"text": {value}}}\n'.encode()
        yield Case(
            f"jsonl: text is {value}",
            written(LINES, GOOD + line),
            (f"{LINES}: line 2", found, "expected"),
        )
    yield Case(
        "jsonl: another column",
        written(LINES, b'{"body": "a"}'),
        ("line 1", "found body", "expected text in column `text`"),
    )
    yield Case("jsonl: no column", written(LINES, b"{}"), ("line 1", "found nothing", "expected text in column `text`"))
    yield Case(
        "jsonl: a blank line", written(LINES, GOOD + b"\n" + GOOD), (f"{LINES}: line 2", "found no JSON", "expected")
    )
    yield Case("jsonl: only blanks", written(LINES, b"\n \n"), ("calibration.text", "empty", "expected text"))
    yield Case("jsonl: empty texts", written(LINES, b'{"text": ""}\n{"text": " "}'), ("empty", "expected text"))
    yield Case("jsonl: a raw form feed", written(LINES, b'{"text": "a\fb"}'), ("line 1", "found no JSON", "expected"))
    yield Case("jsonl: Latin-1", written(LINES, b'{"text": "\xe9"}'), (LINES, "byte 10 is no UTF-8", "expected"))
    yield Case("jsonl: UTF-16", written(LINES, '{"text": "a"}'.encode("utf-16")), (LINES, "is no UTF-8", "expected"))
    yield Case("jsonl: raw half a pair", written(LINES, '{"text": "\ud800"}'), (LINES, "is no UTF-8", "expected"))
    yield Case("jsonl: two in a line", written(LINES, GOOD.rstrip() + GOOD), ("line 1", "found no JSON", "expected"))
    for name in (LINES, TEXT):
        yield Case(f"{name}: a folder", replaced_by_folder(name), (name, "not a file", "expected a file"))
        yield Case(f"{name}: a pipe", replaced_by_pipe(name), (name, "not a file", "expected a file"))
        yield Case(f"{name}: a dangling link", replaced_by_link(name), (name, "not found", "expected"))
        yield Case(f"{name}: a link to itself", replaced_by_link(name, name), (name, "not found", "expected"))
        yield Case(f"{name}: not there", lambda _: None, (name, "not found", "expected"))
    yield Case("txt: empty", written(TEXT, b""), ("calibration.text", "empty", "expected text"))
    yield Case("txt: blanks", written(TEXT, b" \n\t\n"), ("calibration.text", "empty", "expected text"))
    yield Case("txt: Latin-1", written(TEXT, b"caf\xe9"), (TEXT, "byte 3 is no UTF-8", "expected text in UTF-8"))
    yield Case("txt: binary", written(TEXT, bytes(range(256))), (TEXT, "is no UTF-8", "expected text in UTF-8"))
    packed = gzip.compress(GOOD * 20, mtime=0)
    yield Case("gz: not packed", written(SHARD, GOOD), (SHARD, "damaged", "expected lines of JSON, gzipped"))
    yield Case("gz: half a file", written(SHARD, packed[:-9]), (SHARD, "damaged", "expected lines of JSON, gzipped"))
    yield Case("gz: a wrong sum", written(SHARD, packed[:-8] + b"\0" * 8), (SHARD, "damaged", "expected lines"))
    yield Case(
        "gz: a flipped byte", written(SHARD, packed[:14] + b"\xff\xff" + packed[16:]), (SHARD, "damaged", "expected")
    )
    yield Case("gz: empty", written(SHARD, gzip.compress(b"", mtime=0)), (SHARD, "no documents", "expected JSON lines"))
    yield Case(
        "gz: blanks", written(SHARD, gzip.compress(b"\n\n", mtime=0)), (SHARD, "no documents", "expected JSON lines")
    )
    packed = gzip.compress(b'{"body": "a"}\n', mtime=0)
    yield Case("gz: another column", written(SHARD, packed), (f"{SHARD}: line 1", "no text `text`", "expected"))
    yield Case("gz: a folder", replaced_by_folder(SHARD), (SHARD, "not a file", "expected a file"))
    yield Case("gz: a pipe", replaced_by_pipe(SHARD), (SHARD, "not a file", "expected a file"))
    yield Case("gz: no JSON", written(SHARD, gzip.compress(b"{", mtime=0)), (f"{SHARD}: line 1", "found no JSON"))
