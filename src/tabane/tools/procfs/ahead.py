"""Reads what ps will read, as soon as there is a shell: the kernel has it by the time it is typed.

A first `ps` makes eight requests for each process, one after the other, and with each the tool and
the server wait for each other to be woken. Some readers at once leave the server no time to sleep,
and what they have read, the tool need not ask for. They see what anybody sees: what changes after
that is told to the kernel as ever, and what it keeps is good for no longer.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path

from tabane.clock import SYSTEM, Clock
from tabane.tools.procfs.feed import FRESH_S
from tabane.tools.procfs.numbers import FIRST

READ = ("stat", "status", "cmdline")
LOOKED_FOR = ("environ", "ctty")
"""Opened by ps too, but one is empty, and the other none has; the kernel remembers both."""
READERS = 4
"""With more the server, which is one thread, is no busier."""


def read_ahead(root: Path = Path("/proc"), *, clock: Clock = SYSTEM) -> int:
    """Of how many processes. Ends after `FRESH_S` at the latest: on behalf of nobody, the nodes are
    not asked again. Raises `OSError` when the processes cannot be listed."""
    until = clock.now() + FRESH_S
    names = os.listdir(root)  # noqa: PTH208
    left = iter([f"{root}/{name}" for name in names if name.isdigit() and int(name) >= FIRST])

    def read() -> int:
        return sum(_read(directory) for directory in takewhile(lambda _: clock.now() < until, left))

    with ThreadPoolExecutor(READERS) as readers:
        return sum(done.result() for done in [readers.submit(read) for _ in range(READERS)])


def _read(directory: str) -> bool:
    """Whether it is still there."""
    for name in READ:
        try:
            fd = os.open(f"{directory}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            os.read(fd, 1)
        finally:
            os.close(fd)
    for name in LOOKED_FOR:
        os.access(f"{directory}/{name}", os.F_OK)
    return True
