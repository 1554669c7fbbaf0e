"""Ending a process that is named by pid and start time, so that no other is hit by mistake."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable

from tabane.clock import SYSTEM
from tabane.errors import TimedOut
from tabane.runtimes.process import is_same

MEANWHILE_S = 0.1


def _open(pid: int, ticks: int) -> int | None:
    """A pidfd of the process that started at `ticks`, or None when it has ended. Close it."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    if is_same(pid, ticks):
        return descriptor
    os.close(descriptor)
    return None


def _wait_ended(descriptor: int, timeout_s: float, meanwhile: Callable[[], None]) -> bool:
    """Block until the process of a pidfd has ended; False when it still runs after `timeout_s`."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    deadline = SYSTEM.now() + timeout_s
    while (left_s := deadline - SYSTEM.now()) > 0:
        meanwhile()
        if poll.poll(min(left_s, MEANWHILE_S) * 1000):
            return True
    return False


def end_process(
    pid: int,
    ticks: int,
    *,
    term_timeout_s: float = 0,
    kill_timeout_s: float = 5,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """TERM, `term_timeout_s`, then KILL; return when it has ended. One that has ended is fine.

    Without a `term_timeout_s` it is killed at once. Raises `TimedOut` when even KILL does not end
    it (a process that hangs in the kernel). `meanwhile` is called now and then as long as it waits.
    """
    descriptor = _open(pid, ticks)
    if descriptor is None:
        return
    try:
        if term_timeout_s:
            _send(descriptor, signal.SIGTERM)
            if _wait_ended(descriptor, term_timeout_s, meanwhile):
                return
        _send(descriptor, signal.SIGKILL)
        if not _wait_ended(descriptor, kill_timeout_s, meanwhile):
            raise TimedOut(f"process {pid} does not end although it was killed: look at its stack")
    finally:
        os.close(descriptor)


def _send(descriptor: int, number: signal.Signals) -> None:
    try:
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return
