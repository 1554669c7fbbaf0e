"""Typing, and reading what is on the screen."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.real.conftest import GIVE_UP_S


@contextmanager
def at_terminal(argv: list[str], **options: Any) -> Iterator[Callable[..., str]]:
    """A program at a terminal of its own. The function types, and returns what is on the screen
    once a pattern is there."""
    pid, terminal = pty.fork()
    if not pid:
        os.environ.update({"TERM": "xterm", "LINES": "40", "COLUMNS": "150"}, **options)
        os.execv(argv[0], argv)
    screen = ""

    def until(pattern: str, keys: str = "") -> str:
        nonlocal screen
        screen = "" if keys else screen
        os.write(terminal, keys.encode())
        while not re.search(pattern, screen):
            ready, _, _ = select.select([terminal], [], [], GIVE_UP_S)
            assert ready, f"{pattern} did not come: {screen[-2000:]}"
            try:
                screen += os.read(terminal, 1 << 16).decode(errors="replace")
            except OSError:
                raise AssertionError(f"it ended before {pattern}: {screen[-2000:]}") from None
        return screen

    try:
        yield until
        while True:
            try:
                if not os.read(terminal, 1 << 16):
                    break
            except OSError:
                break
    finally:
        os.close(terminal)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
