"""What the kernel's own interface wants a helper for; first of all unix sockets in deep
directories: the kernel takes 108 bytes of path. So where a path is longer
the socket's directory is opened, and the path used is `/proc/self/fd/N/NAME`, which is always
short. (The kernel shows everybody the path that a socket was bound with: the true one, if it fits.)

The standard library only, as the holder wants it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LONGEST = 107
"""Of a path, in bytes; a zero ends it."""


@contextmanager
def shortened(path: Path) -> Iterator[str]:
    """A path to the same file, while it is needed. Raises `OSError` without its directory."""
    if len(os.fsencode(path.absolute())) <= LONGEST:
        yield str(path.absolute())
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def connect_unix(path: Path, timeout_s: float | None = None) -> socket.socket:
    """A connected socket with that timeout (None: blocking; 0: it never blocks, not even now).
    Raises `OSError`."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(timeout_s)
    try:
        with shortened(path) as short:
            sock.connect(short)
    except BaseException:
        sock.close()
        raise
    return sock


def open_nothing() -> int:
    """A descriptor to read from that is at its end: a program's standard input. It is not
    /dev/null, as crun gives its input to the instance's owner, and that one is the machine's."""
    reader, writer = os.pipe()
    os.close(writer)
    return reader
