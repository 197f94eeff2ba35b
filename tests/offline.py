"""No test reaches a network: a connection is refused, and the test that tried it fails."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

reached: list[str] = []  # what tests tried to reach
_allowed: list[bool] = []  # a value for each test or fixture that may connect to this machine


def block() -> None:
    """Refuse connections from now on, in all threads; the sockets of the file system stay open."""
    sys.addaudithook(_refuse)


@contextlib.contextmanager
def loopback() -> Iterator[None]:
    """Inside, connections to this machine succeed. Other ones fail, as without a network."""
    _allowed.append(True)
    try:
        yield
    finally:
        _allowed.pop()


def _refuse(event: str, words: tuple[Any, ...]) -> None:
    if event in ("socket.connect", "socket.sendto"):
        host = words[1][0] if isinstance(words[1], tuple) else None  # a path is a socket of the file system
    else:
        host = words[0] if event in ("socket.getaddrinfo", "socket.gethostbyname") else None
    if host and not (_allowed and host in ("localhost", "127.0.0.1", "::1", b"127.0.0.1")):
        if not _allowed:
            reached.append(f"{event} {host!r}")
        raise OSError(f"tests have no network: {host!r}")
