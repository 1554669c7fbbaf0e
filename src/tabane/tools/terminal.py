"""This end's terminal, while a program elsewhere has it."""

from __future__ import annotations

import os
import signal
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

FALLBACK = (24, 80)
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)


def size_of(descriptor: int) -> tuple[int, int]:
    """Rows and columns; a terminal that does not know them has the usual ones."""
    with suppress(OSError):
        found = os.get_terminal_size(descriptor)
        if found.lines and found.columns:
            return found.lines, found.columns
    return FALLBACK


@contextmanager
def raw(descriptor: int) -> Iterator[None]:
    """Every key is passed on, and nothing is echoed here. However this process ends, but by KILL,
    and while it is stopped, the terminal is as it was."""
    before = termios.tcgetattr(descriptor)

    def restore() -> None:
        with suppress(termios.error):
            termios.tcsetattr(descriptor, termios.TCSANOW, before)

    def on_end(number: int, frame: Any) -> None:
        restore()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def on_stop(number: int, frame: Any) -> None:
        restore()
        os.kill(os.getpid(), signal.SIGSTOP)
        tty.setraw(descriptor, termios.TCSANOW)
        os.kill(os.getpid(), signal.SIGWINCH)

    handlers = dict.fromkeys(ENDING, on_end) | {signal.SIGTSTP: on_stop}
    were = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        tty.setraw(descriptor, termios.TCSADRAIN)
        yield
    finally:
        restore()
        for number, handler in were.items():
            signal.signal(number, handler)


@contextmanager
def resizes() -> Iterator[int]:
    """A descriptor that is readable when the size has changed."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def tell(number: int, frame: Any) -> None:
        with suppress(BlockingIOError):
            os.write(writer, b"\0")

    was = signal.signal(signal.SIGWINCH, tell)
    try:
        yield reader
    finally:
        signal.signal(signal.SIGWINCH, was)
        os.close(reader)
        os.close(writer)
