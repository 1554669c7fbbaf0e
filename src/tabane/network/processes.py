"""Processes that are named by pid and start time, so that a reused pid is never taken for them."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path

from tabane.errors import TimedOut

_START_TIME_FIELD = 22 - 3
"""Of /proc/PID/stat, counted after the parenthesised command name (proc(5))."""


def start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(stat.rpartition(b") ")[2].split()[_START_TIME_FIELD])


def open_process(pid: int, ticks: int) -> int | None:
    """A pidfd of the process that started at `ticks`, or None when it has ended. Close it."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    if start_ticks(pid) == ticks:
        return descriptor
    os.close(descriptor)
    return None


def is_running(pid: int, ticks: int) -> bool:
    """Whether the process that started at `ticks` has not ended (one nobody has reaped has)."""
    descriptor = open_process(pid, ticks)
    if descriptor is None:
        return False
    try:
        return not wait_ended(descriptor, 0)
    finally:
        os.close(descriptor)


def wait_ended(descriptor: int, timeout_s: float) -> bool:
    """Block until the process of a pidfd has ended; False when it still runs after `timeout_s`."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def end_process(
    pid: int, ticks: int, *, term_timeout_s: float = 0, kill_timeout_s: float = 5
) -> None:
    """TERM, `term_timeout_s`, then KILL; return when it has ended. One that has ended is fine.

    Without a `term_timeout_s` it is killed at once. Raises `TimedOut` when even KILL does not end
    it (a process that hangs in the kernel).
    """
    descriptor = open_process(pid, ticks)
    if descriptor is None:
        return
    try:
        if term_timeout_s:
            _send(descriptor, signal.SIGTERM)
            if wait_ended(descriptor, term_timeout_s):
                return
        _send(descriptor, signal.SIGKILL)
        if not wait_ended(descriptor, kill_timeout_s):
            raise TimedOut(f"process {pid} does not end although it was killed: look at its stack")
    finally:
        os.close(descriptor)


def _send(descriptor: int, number: signal.Signals) -> None:
    try:
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return
